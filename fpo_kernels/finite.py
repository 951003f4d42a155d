"""Where a number that is not finite arises: which module makes it, of which example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .batches import Batch, rows_of
from .gradients import Factors, Rows, Scaled, Stream, Vectors, segment_sums
from .layers import Site


class Fault(NamedTuple):
    """The first place where an example has NaN or an infinite number.

    Attributes:
        example: its row in the batch; None where it is not told from the others (a module without the batch in front).
        where: the module's name, or the parameter's of a gradient.
        what: "makes": what the module returns has one, and nothing that it was given; "reads": what it was given has
            one, made between modules, or by the batch itself; "gradient": the forward is sound, and what arrives at the
            parameter's module on the way back is not.
    """

    example: int | None
    where: str
    what: Literal["makes", "reads", "gradient"]

    def __str__(self) -> str:
        whose = "" if self.example is None else f"example {self.example}: "
        if self.what == "gradient":
            return f"{whose}the gradient that arrives at {self.where} is not finite"
        return f"{whose}{self.where} {self.what} a number that is not finite"


class ForwardLook:
    """Hooks on every module for one forward, under `with`; `found`: row → the first place, None for all rows."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.found: dict[int | None, Fault] = {}
        self._model, self._size = model, rows_of(batch)
        self._handles: list[Any] = []

    def __enter__(self) -> ForwardLook:
        for name, module in self._model.named_modules():
            if not any(module.children()):
                hook = self._hook_of(name or type(module).__name__)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook_of(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            made = self._bad_rows(output)
            for row in made - self.found.keys():
                what: Literal["reads", "makes"] = "reads" if row in self._bad_rows([args, kwargs]) else "makes"
                self.found[row] = Fault(row, name, what)

        return hook

    def _bad_rows(self, value: Any) -> set[int | None]:
        """Rows of tensors in a value, of whatever mappings and lists, that are not finite."""
        rows: set[int | None] = set()
        for tensor in _tensors(value):
            if tensor.ndim and len(tensor) == self._size:
                rows |= set(_not_finite(tensor).nonzero()[:, 0].tolist())
            elif not bool(tensor.isfinite().all()):
                rows.add(None)
        return rows


def forward_faults(model: nn.Module, batch: Batch) -> list[Fault]:
    """The first module, in the order of the forward, that has a number of each example that is not finite.

    Runs the model once, without a tape; looks at modules that have no modules in them. What is done between modules is
    found where the next module reads it.

    Args:
        model: called as `model(**batch)`. batch: B sequences.

    Returns:
        One for each example that has such a number, by row; one without a row where the examples cannot be told apart.
        [] where all is finite.
    """
    with torch.no_grad(), ForwardLook(model, batch) as look:
        model(**batch)
    return in_order(look.found.values())


def in_order(found: Iterable[Fault]) -> list[Fault]:
    """By row, what is of no single one first."""
    return sorted(found, key=lambda one: -1 if one.example is None else one.example)


def of_streams(sites: Sequence[Site], streams: Sequence[Stream], found: dict[int | None, Fault]) -> None:
    """Add the examples of which a gradient that arrived is not finite; the first that arrived stays."""
    for site, stream in zip(sites, streams, strict=True):
        for row in _not_finite(_of_examples(stream)).nonzero()[:, 0].tolist():
            found.setdefault(row, Fault(row, site.name, "gradient"))


def _of_examples(stream: Stream) -> Tensor:
    """(B, n) numbers that are not finite where an example's gradient is not."""
    if isinstance(stream, Scaled) and stream.d is not None:
        return stream.d.flatten(1)
    if isinstance(stream, Vectors):
        return stream.v
    assert isinstance(stream, (Factors, Rows))
    bad = (~stream.d.isfinite()).any(1)
    return torch.where(segment_sums(bad.float()[:, None], stream.packing) > 0, torch.nan, 0.0)


def _not_finite(x: Tensor) -> Tensor:
    """(B,) whether a row has one."""
    return ~x.isfinite().flatten(1).all(1) if x.ndim > 1 else ~x.isfinite()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
