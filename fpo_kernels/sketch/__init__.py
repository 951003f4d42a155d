"""Short vectors that keep the inner products of per-example gradients."""

from fpo_kernels.sketch.api import grad_sketch
from fpo_kernels.sketch.ops import unchecked_sketch
from fpo_kernels.sketch.spec import TensorSketch

__all__ = ["TensorSketch", "grad_sketch", "unchecked_sketch"]
