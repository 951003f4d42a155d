"""Per-example gradient inner products of whole models, without building the gradients."""

from .checkpoints import CheckpointStore, tracin
from .curvature import Curvature, exact_steering, logistic_weights
from .direction import grad_direction
from .fingerprint import fingerprint
from .finite import Fault, forward_faults
from .influence import Influence, Steering
from .layers import Coverage
from .library import native_libraries
from .packing import pack
from .products import grad_products
from .sketch import SJLT, DenseProjection, LoGra, TensorSketch, grad_sketch
from .store import SketchSpace, SketchStore
from .verification import Verdict, verify_kernels

__version__ = "0.1.0"

__all__ = [
    "SJLT",
    "CheckpointStore",
    "Coverage",
    "Curvature",
    "DenseProjection",
    "Fault",
    "Influence",
    "LoGra",
    "SketchSpace",
    "SketchStore",
    "Steering",
    "TensorSketch",
    "Verdict",
    "exact_steering",
    "fingerprint",
    "forward_faults",
    "grad_direction",
    "grad_products",
    "grad_sketch",
    "logistic_weights",
    "native_libraries",
    "pack",
    "tracin",
    "verify_kernels",
]
