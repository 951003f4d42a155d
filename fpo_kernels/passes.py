"""Tapped passes of one model, and what they teach about it.

What a parameter's module is called with is only seen when it runs. The first passes therefore look closely:
that no parameter is used outside its modules, that no example's output depends on another's rows, that padding
is not read. What they find is remembered; a parameter that cannot be told apart by example is refused by name,
or served by one plain backward an example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .batches import Batch, rows_of, take
from .capture import Known, Taps, UnservedError, frozen, tapped
from .gather import Consume, Gather, Layout, PaddingReadError
from .gradients import Stream, Vectors
from .layers import Coverage, Site, survey

T = TypeVar("T")
PER_EXAMPLE = "per_example"


class Passes:
    """Runs a model forward and backward and hands each chosen parameter's streams over."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Mapping[str, nn.Parameter],
        output: Callable[[Any, Batch], Tensor],
        fallback: str,
    ) -> None:
        self.model = model
        self.chosen = dict(chosen)
        self._output = output
        self._fallback = fallback
        self._sites, self._refused = survey(model, self.chosen)
        self._unused: set[str] = set()
        self._known = Known()
        self._looked: set[tuple[object, ...]] = set()  # kinds of batches that were looked at
        self._whole = False  # whether padded positions count, because the model reads them
        self._reached = False  # whether a pass had a tape
        self._parts = list(_parts(model))
        hopeless = {n: why for n, why in self._refused.items() if not chosen[n].is_floating_point()}
        if hopeless or fallback == "error":
            self._refuse(hopeless or self._refused)

    def current(self) -> bool:
        """Whether the model still consists of the very modules and parameters it had."""
        now = list(_parts(self.model))
        return len(now) == len(self._parts) and all(a is b for a, b in zip(now, self._parts, strict=True))

    def coverage(self) -> list[Coverage]:
        """One row a chosen parameter, in the model's order."""
        rules = {site.name: next(iter(site.rules.values())).name for site in self._sites}
        shared = {site.name for site in self._sites if len(site.rules) > 1}
        rows = []
        for name, parameter in self.chosen.items():
            rule, reason = rules.get(name), self._refused.get(name, "")
            if name in self._refused:
                rule = PER_EXAMPLE if self._fallback == PER_EXAMPLE else None
            elif name in self._unused:
                reason = "not used by the model's forward so far: its gradient is zero"
            elif name in shared:
                reason = "shared by several modules, counted once"
            rows.append(Coverage(name, tuple(parameter.shape), rule, reason))
        return rows

    def settled(self, call: Callable[[], T]) -> T:
        """What `call` returns once its passes find nothing new; it is begun anew after each find."""
        while True:
            try:
                return call()
            except PaddingReadError:
                self._whole = True
            except UnservedError as unserved:
                self._refused |= unserved.reasons
                if self._fallback == "error":
                    self._refuse(unserved.reasons)
                self._sites = [site for site in self._sites if site.name not in unserved.reasons]

    def run(self, batch: Batch, consume: Consume) -> Tensor:
        """One forward and one backward; `consume` meets each parameter's stream as it is complete. → outputs (B,).

        Raises:
            ValueError: the outputs are not one scalar an example, or depend on no chosen parameter.
            UnservedError, PaddingReadError: for `settled`.
        """
        if not self._sites:
            outputs = self._plain(batch)
        else:
            kind = self._kind(batch)
            if kind not in self._looked:
                self._look(batch)
                self._looked |= {kind, (1, *kind[1:])}
            outputs = self._tapped(batch, consume)
        for name, vectors in self._formed(batch).items():
            consume([Site(name, self.chosen[name], {})], [vectors])
        return outputs

    def _kind(self, batch: Batch) -> tuple[object, ...]:
        """What a model may take another path for: one example or several, entries, modes."""
        entries = []
        for key in sorted(batch):
            value = batch[key]
            told = value.ndim if isinstance(value, Tensor) else value if isinstance(value, (bool, str)) else None
            entries.append((key, type(value), told))
        device = next(iter(self.chosen.values())).device.type
        return min(rows_of(batch), 2), tuple(entries), self.model.training, torch.is_autocast_enabled(device)

    def _tapped(self, batch: Batch, consume: Consume) -> Tensor:
        layout = Layout(batch, self._whole)
        with tapped(self.model, self._sites, layout.shape, self._known) as taps:
            outputs = self._forward(batch, taps)
            self._probe(taps, batch, outputs, sizes=1)
            self._unused -= {name for module, _ in taps.calls for name in taps.names[module]}
            gather = Gather(self._sites, layout, taps.calls, consume)
            # of a model that had a tape before, an output without one has no gradient
            if outputs.requires_grad or not (self._refused or self._reached):
                taps.backward(outputs, gather.deliver)
                self._reached = True
        gather.finish()
        layout.check()
        return outputs.detach()

    def _look(self, batch: Batch) -> None:
        """A pass over two or three examples that only looks; over all where the output map takes no fewer."""
        size = rows_of(batch)
        few = take(batch, slice(0, 2 if size == 3 else 3))
        try:
            self._look_at(few, sizes=1 if size <= 2 else 2)
        except UnservedError:
            raise
        except Exception:
            if size <= 2:
                raise
            self._look_at(batch, sizes=1)

    def _look_at(self, batch: Batch, sizes: int) -> None:
        layout = Layout(batch, self._whole)
        with tapped(self.model, self._sites, layout.shape, self._known) as taps:
            with taps.uses:
                outputs = self._forward(batch, taps)
            calls = Counter(module for module, _ in taps.calls)
            if outside := taps.uses.outside(calls, self._sites):
                raise UnservedError(outside)
            self._probe(taps, batch, outputs, sizes)
        silent = [s for s in self._sites if not any(calls[m] for m in s.rules) and s.name not in self._unused]
        if silent:
            self._check_unused(batch, silent)

    def _probe(self, taps: Taps, batch: Batch, outputs: Tensor, sizes: int) -> None:
        """That examples do not meet in modules which no earlier pass has seen to keep them apart.

        Where a module's calls have the batch in front at two sizes of it, that is evidence enough; otherwise its
        gradients have to show it.
        """
        called = {module for module, _ in taps.calls}
        self._known.checked |= called  # their taps would have raised
        if len(outputs) == 1 or called <= self._known.separable or not outputs.requires_grad:
            return
        leaks, proven = taps.leaks(outputs)
        if leaks:
            if self._mixed(batch, taps, outputs):
                raise ValueError("output: the scalars of a batch's examples depend on one another")
            reason = "the batch is not the first dimension of its module's call, or examples meet there"
            raise UnservedError(_named(taps, leaks, reason))
        self._known.separable |= proven | (taps.plain if sizes == 2 else set())

    def _mixed(self, batch: Batch, taps: Taps, outputs: Tensor) -> bool:
        """Whether examples alone have other outputs than together."""
        taps.idle = True
        with torch.no_grad():
            alone = torch.cat([self._outputs(take(batch, slice(i, i + 1))) for i in range(len(outputs))]).double()
        off = (alone - outputs.double()).norm()
        return bool(off > torch.finfo(outputs.dtype).eps ** 0.5 * outputs.double().norm())

    def _forward(self, batch: Batch, taps: Taps) -> Tensor:
        try:
            return self._outputs(batch)
        except Exception as problem:
            if isinstance(problem, UnservedError) or not taps.expanded or not self._runs(batch, taps):
                raise
            # of what was expanded, embeddings are the last suspects: position embeddings are everywhere
            odd = {m for m in taps.expanded if not isinstance(m, nn.Embedding)} or taps.expanded
            raise UnservedError(
                _named(taps, odd, "its call is broadcast over the batch and cannot be expanded")
            ) from problem

    def _outputs(self, batch: Batch) -> Tensor:
        outputs = self._output(self.model(**batch), batch)
        rows = rows_of(batch)
        if not isinstance(outputs, Tensor) or outputs.shape != (rows,) or not outputs.is_floating_point():
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"output: wanted one floating-point scalar an example, ({rows},), got {got}")
        return outputs

    def _runs(self, batch: Batch, taps: Taps) -> bool:
        """Whether the model takes this batch where no call is expanded."""
        taps.idle = True
        try:
            with torch.no_grad(), taps.uses.paused():
                self._outputs(batch)
        except Exception:
            return False
        finally:
            taps.idle = False
        return True

    def _check_unused(self, batch: Batch, sites: list[Site]) -> None:
        """Parameters whose modules were not called may still be used in ways that no tap and no count sees."""
        parameters = [site.parameter for site in sites]
        with frozen(self.model, parameters), torch.enable_grad():
            outputs = self._outputs(batch)
            used = []
            if outputs.requires_grad:
                got = torch.autograd.grad(outputs.sum(), parameters, allow_unused=True)
                used = [site.name for site, gradient in zip(sites, got, strict=True) if gradient is not None]
        if used:
            raise UnservedError(dict.fromkeys(used, "used outside its module's call (which is never made)"))
        self._unused |= {site.name for site in sites}

    def _plain(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._outputs(batch)

    def _formed(self, batch: Batch) -> dict[str, Stream]:
        """Gradients of the refused parameters by one forward and backward an example: (B, weights) each."""
        parameters = {name: self.chosen[name] for name in self.chosen if name in self._refused}
        if not parameters:
            return {}
        size = rows_of(batch)
        wide = {name: torch.float64 if p.dtype == torch.float64 else torch.float32 for name, p in parameters.items()}
        rows = {n: torch.zeros(size, p.numel(), dtype=wide[n], device=p.device) for n, p in parameters.items()}
        with frozen(self.model, parameters.values()), torch.enable_grad():
            for i in range(size):
                one = take(batch, slice(i, i + 1))
                scalar = self._outputs(one).sum()
                if not scalar.requires_grad:
                    continue
                gradients = torch.autograd.grad(scalar, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        rows[name][i] = gradient.flatten()
        return {name: Vectors(v) for name, v in rows.items()}

    def _refuse(self, reasons: Mapping[str, str]) -> None:
        if not reasons:
            return
        named: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            named.setdefault(reason, []).append(name)
        told = "; ".join(f"{_some(names)}: {reason}" for reason, names in named.items())
        raise ValueError(
            f"parameters whose gradients cannot be told apart by example were chosen ({told}); leave them out "
            'through `parameters`, or compute them by one backward an example with fallback="per_example"'
        )


def _named(taps: Taps, modules: set[nn.Module], reason: str) -> dict[str, str]:
    return {name: reason for module in modules for name in taps.names[module]}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


def _parts(model: nn.Module) -> Iterator[object]:
    for module in model.modules():
        yield module
        yield from module._parameters.values()
