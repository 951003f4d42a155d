"""Per-example gradient inner products of whole models, without building the gradients."""

from .checkpoints import CheckpointStore, tracin
from .direction import grad_direction
from .influence import Influence, Steering
from .layers import Coverage
from .packing import pack
from .products import grad_products

__all__ = ["CheckpointStore", "Coverage", "Influence", "Steering", "grad_direction", "grad_products", "pack", "tracin"]
