"""Per-example gradient inner products of whole models, without building the gradients."""

from .direction import grad_direction
from .fingerprint import fingerprint
from .influence import Influence, Steering
from .layers import Coverage
from .packing import pack
from .products import grad_products
from .store import SketchSpace, SketchStore

__all__ = [
    "Coverage",
    "Influence",
    "SketchSpace",
    "SketchStore",
    "Steering",
    "fingerprint",
    "grad_direction",
    "grad_products",
    "pack",
]
