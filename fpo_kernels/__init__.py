"""Per-example gradient inner products of whole models, without building the gradients."""

from .curvature import Curvature, exact_steering, logistic_weights
from .direction import grad_direction
from .influence import Influence, Steering
from .layers import Coverage
from .packing import pack
from .products import grad_products
from .sketch import TensorSketch, grad_sketch

__all__ = [
    "Coverage",
    "Curvature",
    "Influence",
    "Steering",
    "TensorSketch",
    "exact_steering",
    "grad_direction",
    "grad_products",
    "grad_sketch",
    "logistic_weights",
    "pack",
]
