"""⟨G_i, G_j⟩ for listed pairs of examples, without forming the per-example gradients G."""

from fpo_kernels.products.api import grad_products

__all__ = ["grad_products"]
