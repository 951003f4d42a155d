"""What one GPU is asked in a few minutes: benchmarks/campaign.sh runs each part in a process of its own."""
