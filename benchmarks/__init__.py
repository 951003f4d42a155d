"""Speed and memory of fpo_kernels against plain ways to the same numbers, each gated on being right first."""
