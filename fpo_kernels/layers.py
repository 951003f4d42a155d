"""What a module's per-example gradient is made of, and which parameters can be told apart by example.

A rule turns the (a, d) that a tap delivers into inner products of one parameter's per-example gradients.
Parameters without a rule are named, with the reason, and refused by the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .factors import Factors
from .products import grad_products

Parameters = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
HEAD_NAMES = frozenset({"score", "classifier", "classification_head", "v_head", "value_head", "reward_head"})


def linear_weight_products(own: Factors, pairs: Tensor, other: Factors | None = None) -> Tensor:
    """⟨G_i, G_j⟩ of G_i = Σ_t d_t a_tᵀ for pairs (n, 2) → (n,)."""
    return grad_products(own.a, own.d, own.offsets, pairs, other=other)


def linear_bias_products(own: Factors, pairs: Tensor, other: Factors | None = None) -> Tensor:
    """⟨b_i, b_j⟩ of b_i = Σ_t d_t for pairs (n, 2) → (n,)."""
    left = _sums(own)
    right = left if other is None else _sums(other)
    return (left[pairs[:, 0]] * right[pairs[:, 1]]).sum(-1)


def _sums(factors: Factors) -> Tensor:
    """Σ_t d_t of each example, (B, q), in fp32 or float64, summed in a fixed order."""
    d = factors.d if factors.d.dtype == torch.float64 else factors.d.float()
    return torch.segment_reduce(d, "sum", offsets=factors.offsets, axis=0, initial=0)


class Coverage(NamedTuple):
    """How one chosen parameter is served: `rule` names the way, or is None and `reason` says why not."""

    parameter: str
    shape: tuple[int, ...]
    rule: str | None
    reason: str


@dataclass(frozen=True)
class Site:
    """A chosen parameter, the modules that use it and the inner products of its per-example gradients."""

    name: str
    parameter: nn.Parameter
    modules: tuple[nn.Module, ...]
    products: Callable[[Factors, Tensor, Factors | None], Tensor]


_RULES = {"weight": linear_weight_products, "bias": linear_bias_products}


def choose(model: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """The chosen parameters by canonical name.

    Raises:
        ValueError: nothing chosen, an unknown keyword, or a name or glob that matches no parameter.
    """
    everything = dict(model.named_parameters())
    if callable(parameters):
        chosen = {name: p for name, p in everything.items() if parameters(name, p)}
    elif parameters == "all":
        chosen = everything
    elif parameters == "head":
        # peft keeps the head it replaced beside the one in use, under the name original_module
        parts = {n: set(n.split(".")) for n in everything}
        chosen = {n: p for n, p in everything.items() if HEAD_NAMES & parts[n] and "original_module" not in parts[n]}
    elif parameters == "lora":
        chosen = {n: p for n, p in everything.items() if "lora_" in n}
    elif parameters == "trainable":
        chosen = {n: p for n, p in everything.items() if p.requires_grad}
    elif isinstance(parameters, str) or not isinstance(parameters, Sequence):
        raise ValueError(
            f"parameters={parameters!r}: wanted 'all', 'head', 'lora', 'trainable', "
            "a list of names or globs, or a predicate on (name, parameter)"
        )
    else:
        chosen = _by_globs(model, everything, parameters)
    if not chosen:
        raise ValueError(f"parameters={parameters!r} chooses no parameter of {type(model).__name__}")
    return chosen


def _by_globs(model: nn.Module, everything: dict[str, nn.Parameter], globs: Sequence[str]) -> dict[str, nn.Parameter]:
    aliases = dict(model.named_parameters(remove_duplicate=False))
    wanted: set[int] = set()
    for glob in globs:
        hits = {id(p) for name, p in aliases.items() if fnmatchcase(name, glob)}
        if not hits:
            raise ValueError(f"parameters: {glob!r} matches no parameter of {type(model).__name__}")
        wanted |= hits
    return {name: p for name, p in everything.items() if id(p) in wanted}


def survey(model: nn.Module, chosen: dict[str, nn.Parameter]) -> tuple[list[Site], list[Coverage]]:
    """Who serves each chosen parameter: the sites that can, and one coverage row a parameter."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    sites, rows = [], []
    for name, parameter in chosen.items():
        uses = owners[id(parameter)]
        reason = next((why for module, attribute in uses if (why := _objection(module, attribute))), "")
        attribute = uses[0][1]
        if not reason and len({attribute for _, attribute in uses}) > 1:
            reason = "shared between a weight and a bias"
        rule = None if reason else f"linear {attribute}"
        rows.append(Coverage(name, tuple(parameter.shape), rule, reason))
        if rule:
            sites.append(Site(name, parameter, tuple(module for module, _ in uses), _RULES[attribute]))
    return sites, rows


def _objection(module: nn.Module, attribute: str) -> str:
    if type(module) is not nn.Linear or attribute not in _RULES:
        return f"no rule for {type(module).__name__}.{attribute}"
    if not module.weight.is_floating_point():
        return f"a {module.weight.dtype} weight has no gradient"
    return ""
