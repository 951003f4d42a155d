"""⟨G_i, V⟩ of every example's gradient with one stored matrix, without forming the per-example gradients G."""

from fpo_kernels.direction.api import grad_direction
from fpo_kernels.direction.ops import unchecked_direction

__all__ = ["grad_direction", "unchecked_direction"]
