"""Two revisions timed against each other: `python -m benchmarks compare <base> <head>`."""
