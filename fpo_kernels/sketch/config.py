"""Launch numbers and scratch bounds of the sketch, each with its reason."""

from __future__ import annotations

# impl="torch": what one block of tokens takes at most (its gathered features, folded rows and both spectra).
SCRATCH_BYTES = 32 * 2**20

# impl="native": layers that share a in one launch; csrc/cuda passes them in a launch's parameters (kLayers).
MOST_LAYERS = 8
