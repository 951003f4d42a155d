"""Short vectors that keep the inner products of per-example gradients."""

from fpo_kernels.sketch.api import grad_sketch
from fpo_kernels.sketch.buckets import row_buckets, spectrum, vector_buckets
from fpo_kernels.sketch.comparison import SJLT, DenseProjection, LoGra
from fpo_kernels.sketch.grouped import Member, grouped_sketch
from fpo_kernels.sketch.maps import BucketMap, kept_map
from fpo_kernels.sketch.ops import unchecked_sketch
from fpo_kernels.sketch.spec import TensorSketch, check_dim, check_seed

__all__ = [
    "SJLT",
    "BucketMap",
    "DenseProjection",
    "LoGra",
    "Member",
    "TensorSketch",
    "check_dim",
    "check_seed",
    "grad_sketch",
    "grouped_sketch",
    "kept_map",
    "row_buckets",
    "spectrum",
    "unchecked_sketch",
    "vector_buckets",
]
