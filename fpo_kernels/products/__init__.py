"""⟨G_i, G_j⟩ for listed pairs of examples, without keeping the per-example gradients G."""

from fpo_kernels.products.api import are_grouped, choose_way, grad_products, new_ledger, unchecked_products

__all__ = ["are_grouped", "choose_way", "grad_products", "new_ledger", "unchecked_products"]
