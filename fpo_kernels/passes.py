"""Tapped passes of one model, and what they teach about it.

What a parameter's module is called with is only seen when it runs. Every pass sees that no parameter is used outside
its modules, that examples were seen to keep apart in modules called this way, and that padding is not read; batches
of a new kind are compared with one ordinary backward (`compare`), over examples taken out of their company, so that
it also shows whether they meet. A parameter that cannot be told apart by example is refused by name, or served by one
plain backward an example.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import untapped
from .batches import Batch, as_long_as_the_batch, kinds_of_entries, rows_of, take, telling, unchanged
from .capture import Taps
from .compare import Comparison, is_fine
from .course import Course
from .entries import refuse_shared
from .fallback import formed, used_after_all
from .gather import Consume, Gather, Layout, PaddingReadError, ignore
from .gradients import Vectors
from .known import Known, Manner, Plan, coverage
from .layers import Coverage, Site, survey
from .models import attending, parts_of
from .products import are_grouped
from .refusals import UnexpectedError, UnservedError, UnusableError, named, refuse
from .tapping import tapped

T = TypeVar("T")
PER_EXAMPLE = "per_example"
CHECKS = ("first", "every", "never")


class Passes:
    """Runs a model forward and backward and hands each chosen parameter's streams over."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Mapping[str, nn.Parameter],
        output: Callable[[Any, Batch], Tensor],
        fallback: str,
        check: str,
    ) -> None:
        self.model = model
        self.chosen = dict(chosen)
        self._output = output
        self._fallback = fallback
        self._check = check
        self._sites, self._refused = survey(model, self.chosen)
        self._unused: set[str] = set()
        self._silent: set[frozenset[str]] = set()  # parameters that a pass did without, and rightly so
        self._known = Known()
        self._split: set[frozenset[str]] = set()  # entries seen to hold one thing an example
        self._looked: set[tuple[object, ...]] = set()  # kinds of batches that were looked at
        self._compared: set[tuple[object, ...]] = set()  # and those that were compared
        self._alike: bool | None = None  # whether examples were seen to be the same in a smaller batch
        self._coarse = False  # whether a pass of fp32 weights had 16-bit gradients
        self._whole = False  # whether padded positions count, because the model reads them
        self._left = False  # whether padding stands on the left of the batch that runs
        self._reached = False  # whether a pass had a tape
        self._planned: Plan | None = None
        self._course: Course | None = None  # of the latest forward that was looked at
        self._counting = True  # whether every function of the forward is looked at for uses of parameters
        self._counted: set[tuple[object, ...]] = set()  # kinds of batches for which they were
        self._sound: set[tuple[object, ...]] = set()  # kinds of batches whose padding was seen not to be read
        self._unseen: set[tuple[object, ...]] = set()  # those of this call, and where somebody looked meanwhile
        self._seen: set[tuple[object, ...]] = set()
        self._parts = parts_of(model)
        self.modules = [part for part in self._parts if isinstance(part, nn.Module)]
        hopeless = {n: why for n, why in self._refused.items() if not chosen[n].is_floating_point()}
        if hopeless or fallback == "error":
            refuse(hopeless or self._refused)

    def current(self) -> bool:
        """Whether the model still consists of the very modules, forwards, parameters and hooks on these it had."""
        now = parts_of(self.model)
        return len(now) == len(self._parts) and all(map(operator.is_, now, self._parts))

    def coverage(self) -> list[Coverage]:
        """One row a chosen parameter, in the model's order."""
        without = PER_EXAMPLE if self._fallback == PER_EXAMPLE else None
        return coverage(self.chosen, self._sites, self._refused, self._unused, without)

    def settled(self, call: Callable[[], T]) -> T:
        """What `call` returns once its passes find nothing new; it is begun anew after each find."""
        while True:
            self._unseen, self._seen = set(), set()
            try:
                result = call()
                self._sound |= self._seen
                return result
            except PaddingReadError:
                self._whole = True
            except UnexpectedError:
                self._counted.clear()
            except UnservedError as unserved:
                self._refused |= unserved.reasons
                if self._fallback == "error":
                    refuse(unserved.reasons)
                self._sites = [site for site in self._sites if site.name not in unserved.reasons]

    def padding_read(self, leak: Tensor) -> None:
        """Begin anew with padding that counts, where `leak` says that a row of padding has a gradient.

        Read once for each kind of batch, for which the host waits; later products of the kind are NaN instead.
        """
        if self._unseen - self._sound and bool(leak):
            raise PaddingReadError
        self._seen |= self._unseen

    def layout(self, batch: Batch) -> Layout:
        """How a batch lies where streams may keep rows of padding, which their extents tell, for a `Total` to see."""
        return Layout(batch, self._whole, bool(self._sites) and are_grouped(self._sites[0].parameter))

    @property
    def alike(self) -> bool | None:
        """Whether examples are the same in a smaller batch; None where that was not looked at yet."""
        return self._alike if self._check == "first" and self._fine() else False

    @property
    def device(self) -> torch.device:
        """The first chosen parameter's."""
        return next(iter(self.chosen.values())).device

    @property
    def is_repeatable(self) -> bool:
        """Whether a pass of a kind that was met needs no more than a forward and a backward."""
        return bool(self._sites) and not self._refused and self._check != "every"

    def weights(self) -> object:
        """Where the model's numbers lie."""
        owned = (tensors for module in self.modules for tensors in (module._parameters, module._buffers))
        return [x.data_ptr() for own in owned for x in own.values() if x is not None], self.model.training

    def run(self, batch: Batch, consume: Consume, layout: Layout | None = None) -> Tensor:
        """One forward and one backward; `consume` meets each parameter's stream as it is complete. → outputs (B,).

        With `layout(batch)` streams may keep rows of padding; without one they are cut out. With a static layout the
        pass is one of a kind that was met, and nothing of it is looked at.

        Raises:
            ValueError: the outputs are not one scalar an example, or depend on no chosen parameter.
            UnservedError, PaddingReadError: for `settled`.
        """
        layout = Layout(batch, self._whole) if layout is None else layout
        self._left = layout.left
        if layout.static:
            self._counting = False
            return self._tapped(batch, layout, consume)
        outputs = self._ruled(batch, consume, layout) if self._sites else self._plain(batch)
        for name, vectors in self._formed(batch).items():
            consume([Site(name, self.chosen[name], {})], [vectors])
        return outputs

    def _ruled(self, batch: Batch, consume: Consume, layout: Layout) -> Tensor:
        """The tapped pass, looked at and compared where its batch is of a new kind."""
        size, kind = rows_of(batch), self._kind(batch)
        whole_kind = kind, layout.kind
        if layout.in_place:
            self._unseen.add(whole_kind)
        self._counting = self._check == "every" or whole_kind not in self._counted
        outputs = self._compared_if_due(batch, kind, layout, size, consume)
        self._counted.add(whole_kind)
        return outputs

    def _compared_if_due(
        self, batch: Batch, kind: tuple[object, ...], layout: Layout, size: int, consume: Consume
    ) -> Tensor:
        due = self._check == "every" or (self._check == "first" and (kind, layout.kind) not in self._compared)
        if not due:
            self._look_once(batch, kind)
            return self._tapped(batch, layout, consume)
        fine, every = self._fine(), torch.arange(size)
        # a single example is another's in no order of its own batch
        rows = every if self._check == "every" else telling(batch, least=1 if fine else 3)
        if not fine:
            self._look_once(batch, kind)
        if fine or len(rows) == size:
            outputs = self._compare(batch, kind, layout, rows, consume)
        else:  # in two batches 16 bits round too differently
            some = take(batch, rows)
            self._compare(some, kind, Layout(some, self._whole), every[: len(rows)], ignore)
            outputs = self._tapped(batch, layout, consume)
        self._compared.add((kind, layout.kind))
        return outputs

    def _fine(self) -> bool:
        """Whether the same examples in two batches differ by little."""
        coarse = self._coarse or torch.is_autocast_enabled(self.device.type)
        return not coarse and all(is_fine(parameter) for parameter in self.model.parameters())

    def _kind(self, batch: Batch) -> tuple[object, ...]:
        """What a model may take another path for: one example or several, entries, modes."""
        cast = torch.is_autocast_enabled(self.device.type)
        return min(rows_of(batch), 2), kinds_of_entries(batch), self.model.training, cast

    def _tapped(self, batch: Batch, layout: Layout, consume: Consume, comparison: Comparison | None = None) -> Tensor:
        fine = comparison is not None and comparison.fine
        with tapped(self._plan(), layout.shape, self._known, self._counting, fine) as taps:
            outputs = self._forward(batch, taps)
            course = self._account(taps, batch)
            if not fine:
                self._probe(taps, batch, outputs, sizes=1)
            gather = Gather(course, layout, comparison.beside(consume) if comparison else consume)
            deliver = comparison.weighing(taps, gather.deliver) if comparison else gather.deliver
            # of a model that had a tape before, an output without one has no gradient
            if outputs.requires_grad or not (self._refused or self._reached):
                taps.backward(outputs, deliver)
                self._reached = True
        gather.finish()
        layout.check()
        return outputs.detach()

    def _plan(self) -> Plan:
        if self._planned is None or self._planned.sites is not self._sites:
            self._planned = Plan(self.model, self._sites)
        return self._planned

    def _compare(
        self, batch: Batch, kind: tuple[object, ...], layout: Layout, rows: Tensor, consume: Consume
    ) -> Tensor:
        """A tapped pass, and one ordinary backward over some of its examples, or all. → outputs (B,).

        Over some, in other company than they had, both agree only where examples do not meet. Where they do not
        agree, the reason is looked for: where examples meet, or by the same over all of the batch.
        """
        sites = {site.name: site.parameter for site in self._sites}
        comparison = Comparison(sites, rows, rows_of(batch), fine=self._fine())
        outputs = self._tapped(batch, layout, consume, comparison)
        some, own = (batch, outputs) if comparison.whole else (take(batch, rows), outputs[rows.to(outputs.device)])
        faults: dict[str, str] = {}
        problem: Exception | None = None
        try:
            faults = comparison.faults(self.model, lambda: self._outputs(some), own)
        except torch.OutOfMemoryError:
            raise
        except Exception as caught:  # an output map may take no fewer examples than all
            problem = caught
        self._coarse |= comparison.coarse
        if not faults and problem is None and (comparison.whole or not comparison.coarse):
            if not comparison.whole and self._alike is None:
                self._alike = True
            self._known.separable |= comparison.separated
            if comparison.fine and not comparison.coarse:
                self._believe(comparison.reached())
            if len(outputs) == 1 or comparison.manners <= self._known.separable:
                self._looked |= {kind, (1, *kind[1:])}
            else:  # no gradient came that could show it
                self._look(batch, kind)
            return outputs
        self._look_once(batch, kind)
        if problem is not None and comparison.whole:
            raise problem
        if comparison.whole:
            raise UnservedError(faults)
        self._alike = False
        self._compare(batch, kind, Layout(batch, self._whole), torch.arange(rows_of(batch)), ignore)
        return outputs

    def _account(self, taps: Taps, batch: Batch) -> Course:
        """How the forward went, and that it used the parameters where taps see it, or not at all."""
        taps.settle()
        course, reads = self._course, [own.count for own in taps.reads.values()]
        if course is None or not course.is_of(taps.calls, self._sites, taps.odd):
            course = Course(taps.calls, self._sites, taps.odd)
        elif not self._counting and reads == course.reads and not taps.inner and not taps.untaped:
            return course
        calls = course.times
        if not self._counting and not self._known.expects(taps.reads, calls):
            raise UnexpectedError
        reasons = taps.uses.outside(calls, self._sites) if self._counting else {}
        reasons |= named(
            taps.names, taps.inner, "a gradient is taken through it in the forward, where its weight acts again"
        )
        if reasons:
            raise UnservedError(reasons)
        self._known.expect(taps.reads, calls)
        silent = [site for site in self._sites if not any(calls[module] for module in site.rules)]
        self._unused -= {name for module in calls for name in taps.names[module]}
        key = frozenset(site.name for site in silent)
        if silent and key not in self._silent:
            taps.idle = True
            used = used_after_all(self.model, silent, taps.untaped, lambda: self._outputs(batch))
            if used:
                raise UnservedError(dict.fromkeys(used, "used outside its module's call (which is never made)"))
            self._unused |= {site.name for site in silent}
            taps.idle = False
            self._silent.add(key)
        if not taps.comparing:
            self._believe(set(calls))  # their taps would have raised
        course.reads, self._course = reads, course
        return course

    def _believe(self, modules: set[nn.Module]) -> None:
        self._known.checked |= modules
        self._plan().quicken(self._known)

    def _look_once(self, batch: Batch, kind: tuple[object, ...]) -> None:
        if kind not in self._looked:
            self._look(batch, kind)

    def _look(self, batch: Batch, kind: tuple[object, ...]) -> None:
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
        self._looked |= {kind, (1, *kind[1:])}

    def _look_at(self, batch: Batch, sizes: int) -> None:
        layout = Layout(batch, self._whole)
        with tapped(self._plan(), layout.shape, self._known, self._counting) as taps:
            outputs = self._forward(batch, taps)
            self._account(taps, batch)
            self._probe(taps, batch, outputs, sizes)

    def _probe(self, taps: Taps, batch: Batch, outputs: Tensor, sizes: int) -> None:
        """That examples keep apart in modules of which no earlier pass has seen it, called in this manner.

        Where a module's calls have the batch in front at two sizes of it, that is evidence enough; otherwise its
        gradients have to show it.
        """
        course = self._course
        if course is not None and course.looked:
            return
        called = taps.manners
        if course is not None and called <= self._known.separable:
            course.looked = True
        if len(outputs) == 1 or called <= self._known.separable or not outputs.requires_grad:
            return
        leaks, proven = taps.leaks(outputs)
        if leaks:
            if untapped.meet(batch, taps, outputs, self._outputs):
                raise ValueError("output: the scalars of a batch's examples depend on one another")
            reason = "the batch is not the first dimension of its module's call, or examples meet there"
            raise UnservedError(named(taps.names, leaks, reason))
        plain: set[Manner] = {manner for manner in called if sizes == 2 and not manner.odd}
        self._known.separable |= plain | {manner for manner in called if manner.module in proven}

    def _forward(self, batch: Batch, taps: Taps) -> Tensor:
        try:
            with taps.uses if self._counting else nullcontext():
                return self._outputs(batch)
        except Exception as problem:
            suspect = taps.expanded or self._fallback == PER_EXAMPLE
            known = isinstance(problem, (UnservedError, UnusableError, torch.OutOfMemoryError))
            if known or not suspect or not untapped.runs(batch, taps, self._outputs):
                raise
            # of what was expanded, embeddings are the last suspects: position embeddings are everywhere
            odd = {m for m in taps.expanded if not isinstance(m, nn.Embedding)} or taps.expanded
            reason = "its call is broadcast over the batch and cannot be expanded"
            if not odd:
                odd = set(taps.names)
                reason = f"the model does not run with taps on it ({type(problem).__name__}: {problem})"
            raise UnservedError(named(taps.names, odd, reason)) from problem

    def _outputs(self, batch: Batch) -> Tensor:
        with unchanged(batch), attending(self._left):
            outputs = self._output(self.model(**batch), batch)
        rows = rows_of(batch)
        if not isinstance(outputs, Tensor) or outputs.shape != (rows,) or not outputs.is_floating_point():
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"output: wanted one floating-point scalar an example, ({rows},), got {got}")
        return outputs

    def see_entries(self, batch: Batch) -> None:
        """That entries as long as the batch hold one thing an example; looked at once for the same entries."""
        doubtful = frozenset(as_long_as_the_batch(batch))
        if doubtful and rows_of(batch) > 1 and doubtful not in self._split:
            refuse_shared(batch, doubtful, self._plain)
            self._split.add(doubtful)

    def _plain(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._outputs(batch)

    def _formed(self, batch: Batch) -> dict[str, Vectors]:
        """Gradients of the refused parameters by one forward and backward an example: (B, weights) each."""
        refused = {name: self.chosen[name] for name in self.chosen if name in self._refused}
        return formed(self.model, refused, self._outputs, batch) if refused else {}
