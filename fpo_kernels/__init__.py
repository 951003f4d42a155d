"""Per-example gradient inner products of whole models, without building the gradients."""

from .direction import grad_direction
from .influence import Influence, Steering
from .layers import Coverage
from .packing import pack
from .products import grad_products
from .sketch import TensorSketch, grad_sketch

__all__ = [
    "Coverage",
    "Influence",
    "Steering",
    "TensorSketch",
    "grad_direction",
    "grad_products",
    "grad_sketch",
    "pack",
]
