"""Directions as callers name them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def by_parameter(
    model: nn.Module, chosen: Mapping[str, nn.Parameter], vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The directions by canonical name, each of its parameter's shape.

    Raises:
        ValueError: none, a name that is not a chosen parameter, a tensor of another shape, or one parameter twice.
    """
    if not vectors:
        raise ValueError("vectors: wanted parameter name → tensor, got none")
    canonical = {id(parameter): name for name, parameter in chosen.items()}
    every = dict(model.named_parameters(remove_duplicate=False))
    wanted: dict[str, Tensor] = {}
    for name, vector in vectors.items():
        if name not in every or id(every[name]) not in canonical:
            raise ValueError(f"vectors: {name!r} is not among the chosen parameters")
        if vector.shape != every[name].shape or not vector.is_floating_point():
            raise ValueError(
                f"vectors[{name!r}]: wanted floating point {tuple(every[name].shape)}, "
                f"got {vector.dtype} {tuple(vector.shape)}"
            )
        key = canonical[id(every[name])]
        if key in wanted:
            raise ValueError(f"vectors: {name!r} is {key!r} by another name, and both are given")
        wanted[key] = vector.detach()
    return wanted
