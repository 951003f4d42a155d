"""⟨G_i, G_j⟩ for listed pairs of examples, without keeping the per-example gradients G."""

from fpo_kernels.products.api import grad_products, unchecked_products

__all__ = ["grad_products", "unchecked_products"]
