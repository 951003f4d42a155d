"""Launch numbers and scratch bounds of `grad_products`, each with its reason."""

from __future__ import annotations

# impl="torch": the most that one chunk of tile pairs gathers and multiplies at a time, whatever the lengths.
# Of 16 and 64 MiB the larger was 1.0 to 1.7 times faster on two CPU cores; the plan of a chunk (a few int64
# a tile pair) and the packing inside BLAS come on top.
SCRATCH_BYTES = 64 * 2**20
# 64, 128 and 256 were within a tenth of each other on steering, Gram and 2048-token pairs; 128 keeps the
# padding of ragged ends small and still leaves one tile pair far below the bound.
TILE_TOKENS = 128
# Gathered at a time, so that a vocabulary-wide layer stays in bounds. 2048 saves the second pass that 1024
# needed on 1536 features (a tenth of the call).
FEATURE_CHUNK = 2048
# Tile pairs that fill at least 1/2 of a rectangle are multiplied as the whole rectangle: no gathered repeats.
# 1 and 2 were equal on steering; 2 took 0.7 of the time of 1 on a ragged Gram matrix.
DENSE_FILL = 2

# impl="torch", way="form". Together at most SCRATCH_BYTES: one tile of every example; rows of a and of d, where they
# cannot be read in place; three pieces of tiles where pairs are multiplied elementwise. A tile of 16 MiB took 0.95 of
# the time of one of 8 on 32 texts of 256 tokens, since higher tiles multiply faster (benchmarks/NOTES.md).
FORM_BYTES = 16 * 2**20
ROW_BYTES = 8 * 2**20
ELEMENTWISE_BYTES = 8 * 2**20
# Tiles of 32×32 at least, so that reading rows does not outweigh multiplying them; longer lists are cut.
LEAST_HEIGHT = 32
MOST_EXAMPLES = FORM_BYTES // (4 * LEAST_HEIGHT * LEAST_HEIGHT)
# Rows of an example gathered at a time, where it has as many, before fewer examples share a batch.
LEAST_TOKENS = 64
# Padding that costs as much as a batch of its own, about 30 µs.
PAD_FLOPS = 3_000_000
# A rectangle of pairs is one matrix product if at least 1/4 of it is listed; a partner of 4 pairs is a column.
RECTANGLE_FILL = 4
HUB_PAIRS = 4

# Elements of a tile that one fp32 sum of a matrix product adds up. As fast as whole tiles, and on 16 examples of
# 83,000 elements 20 to 40 times closer to float64.
PIECE = 1024

# impl="native": layers that share a in one launch; csrc/cuda passes them in a launch's parameters (kLayers).
MOST_LAYERS = 8
