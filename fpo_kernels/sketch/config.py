"""Launch numbers and scratch bounds of the sketch, each with its reason."""

from __future__ import annotations

# impl="torch": what one block of tokens takes at most (its gathered features, folded rows and both spectra).
SCRATCH_BYTES = 32 * 2**20

# impl="native": layers that share a in one launch; csrc/cuda passes them in a launch's parameters (kLayers).
MOST_LAYERS = 8

# Streams kept by an engine for one launch of many layers: those of five blocks of an 8B model at 9 × 64 tokens, one at
# 9 × 256, a sixth and a twenty-fifth of what such a model's backward keeps.
KEPT_BYTES = 384 * 2**20
