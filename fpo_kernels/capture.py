"""Taps: hand a module's input and output gradient over while a backward pass runs.

The output of a module that was not seen before passes through an autograd identity that keeps the module's input
(through autograd's own saved tensors, so that checkpointing recomputes it instead of keeping it) and calls back with
(a, d) when the output's gradient d arrives. Of a module that was seen to be plain a call is only noted (`arrivals`).
All parameters are frozen meanwhile: no weight gradient is ever computed, and nothing below the lowest tap is put on
the tape.
"""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .arrivals import Arrivals
from .known import Current, Known, Manner, Plan
from .layers import Lookup, input_of, looked_up, returns_what_it_should, some_rows
from .refusals import UnexpectedError, UnservedError, UnusableError
from .remake import Inputs, Node, maker_of, remade
from .uses import Reads, Uses

PLAIN = Lookup()
# Gradients of so many bytes are noted before they are handed over; each then does little in the middle of a backward.
# On a CPU 4 MiB, which no model notices; 128 MiB are five layers of an 8B model at 9 × 64 tokens.
NOTED_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}


_turn = operator.itemgetter(0)


class Shape(NamedTuple):
    """How many examples a batch holds, and how many tokens each (None where its entries do not say)."""

    examples: int
    tokens: int | None


# One use of a module: (module, group, a, d). Deliveries of one group read the same input tensor; a (B, …, p) is that
# input, or (B, …) ids, None where no rule reads it; d (B, …, q) is the gradient of the module's output.
Deliver = Callable[[nn.Module, int, "Tensor | None", Tensor], None]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, a: Tensor | None, deliver: Callable[[Tensor | None, Tensor], None]
    ):
        ctx.save_for_backward(a)
        ctx.deliver = deliver
        # An alias that autograd does not count as a view: models may go on in place (ReLU(inplace=True)).
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (a,) = ctx.saved_tensors
        ctx.deliver(a, grad)
        return grad, None, None, None


class Taps:
    """What a forward pass under `tapped` left behind: each use of a module in order, and the way back.

    Attributes:
        calls: (module, group) of every use of a tapped module.
        names: module → the chosen parameters it serves.
        expanded: modules whose call was broadcast over the batch and went on expanded to it.
        untaped: modules with a call under no_grad, which adds nothing to any gradient.
        odd: modules that were called without the batch in front.
        inner: modules through which the forward itself took a gradient that can be differentiated again; looked for
            by full taps alone.
        uses: counts the uses of the sites' parameters while it is entered.
        reads: module → a count of how often its parameters were asked for.
        comparing: an ordinary backward will say whether modules return what they should.
        forwards: module whose calls are only noted → the forward that was its own, apart from its class's, or None.
    """

    def __init__(self, plan: Plan, shape: Shape, known: Known, counting: bool, comparing: bool = False) -> None:
        most = NOTED_BYTES.get(plan.device.type, 0)
        self.calls: list[tuple[nn.Module, int]] = []
        self.expanded: set[nn.Module] = set()
        self.untaped: set[nn.Module] = set()
        self.inner: set[nn.Module] = set()
        self.odd: set[nn.Module] = set()
        self.comparing = comparing
        self._idle = False
        self.uses = Uses(plan.sites if counting else ())
        self.reads: dict[nn.Module, Reads] = {}
        self.forwards: dict[nn.Module, Any] = {}
        self.names, self._own, self._reads, self._quick = plan.names, plan.own, plan.reading, plan.quick
        self._size = shape.examples
        self._deliver: Deliver = _nowhere
        self._known = known
        self._shape = shape
        self._anchor = torch.zeros((), device=plan.device, requires_grad=True)
        self._inputs = Inputs()
        self._same = -1  # the group whose input was seen to come out the same when it is made again
        self._arrivals = Arrivals(self._size, self._inputs, self.calls, most)
        self._backward = False
        self._noted: list[tuple[int, nn.Module, int, Tensor | None, Tensor, int]] = []
        self._noted_bytes, self._most_bytes = 0, most

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: pass the output through an identity that remembers the input."""
        if self._idle:
            return output
        if not torch.is_grad_enabled():
            _refuse_reentrant(module)
            self.untaped.add(module)
            return output
        counted = self.reads[module].count  # what is asked for below is no use of the model's
        try:
            if torch._C._are_functorch_transforms_active():
                raise ValueError("it is called inside a torch.func transform")
            if self._known.is_plain(module):
                a, lookup = self._unchanged(module, args, kwargs, output), PLAIN
            else:
                with self.uses.paused(None if isinstance(module, nn.Embedding) else module), torch.no_grad():
                    a, lookup = self._checked(module, args, kwargs, output)
        except ValueError as problem:
            raise UnservedError(dict.fromkeys(self.names[module], str(problem))) from None
        except (TypeError, KeyError, AttributeError, IndexError, RuntimeError) as problem:
            self._unreadable(module, "what it was called with", problem)
        finally:
            self.reads[module].count = counted
        turn = len(self.calls)
        group, given = self._inputs.group(a, a._version, turn), a
        a, output = self._by_example(module, a.detach(), output)
        node = self._maker(module, given, group) if module in self._reads and a.shape == given.shape else None
        if not self._backward:  # under checkpointing the forward runs again during backward
            self.calls.append((module, group))
            self._arrivals.bytes += output.nbytes

        def deliver(a: Tensor | None, d: Tensor) -> None:
            if self.arriving(module):
                a = a if node is None else self._inputs.remade(node, group)
                self.note(turn, module, group, a, lookup.gradient(a, d))

        return _Tap.apply(output, self._anchor, a if module in self._reads and node is None else None, deliver)

    @property
    def idle(self) -> bool:
        """Whether outputs are passed on untouched."""
        return self._idle

    @idle.setter
    def idle(self, idle: bool) -> None:
        self._idle = idle
        self._arrivals.open = not idle and not self._backward

    def under(self, current: Current) -> None:
        """Have stand-ins note calls for this pass."""
        current.arrivals, current.otherwise = self._arrivals, self.hook

    def close(self) -> None:
        """Let go of what the pass made: what is on the tape knows the taps, which know the tape."""
        self._noted, self._deliver = [], _nowhere
        self._arrivals.close()
        self._inputs.close()

    def arriving(self, module: nn.Module) -> bool:
        """Whether a gradient that arrives at a module's output is the pass's, not one that the forward itself takes."""
        if not self._backward and torch.is_grad_enabled():  # create_graph: the weight acts in that gradient too
            self.inner.add(module)
        return self._backward

    def note(self, turn: int, module: nn.Module, group: int, a: Tensor | None, d: Tensor) -> None:
        """Keep the delivery of a call; they are handed over together, in a third of the time that each takes alone."""
        self._noted.append((turn, module, group, a, d, d._version))
        self._noted_bytes += d.nbytes
        if self._noted_bytes >= self._most_bytes:
            self._hand_over()

    def _hand_over(self) -> None:
        """What was noted to the callback, the last call first, without autocast."""
        noted, self._noted, self._noted_bytes = self._noted, [], 0
        noted.sort(key=_turn, reverse=True)  # however they were come by: sums have one order
        kind = self._anchor.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            for _, module, group, a, d, version in noted:
                if d._version != version:
                    raise RuntimeError(f"{type(module).__name__}: the gradient of its output was changed in place")
                try:
                    self._deliver(module, group, a, d)
                except (TypeError, KeyError, AttributeError, IndexError, ValueError) as problem:
                    self._unreadable(module, "its input and the gradient of its output", problem)

    def _maker(self, module: nn.Module, a: Tensor, group: int) -> Node | None:
        """What makes the group's input again, where it was seen to come out the same."""
        with self.uses.paused(module):
            node = maker_of(a)
            if node is not None and module not in self._known.remade:
                if group != self._same and not torch.equal(remade(node, some_rows), some_rows(a)):
                    return None
                self._same = group
                self._known.remade.add(module)
        return node

    def _unreadable(self, module: nn.Module, what: str, problem: Exception) -> NoReturn:
        if isinstance(problem, torch.OutOfMemoryError):
            raise problem
        told = f"{what} could not be read as a {type(module).__name__}'s ({type(problem).__name__}: {problem})"
        raise UnservedError(dict.fromkeys(self.names[module], told)) from problem

    def _checked(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Tensor, Lookup]:
        """The input (or ids) and what becomes of the rows, of a module that does what its rules suppose."""
        lookups = self._known.lookups
        a = self._unchanged(module, args, kwargs, output)
        if isinstance(module, nn.Embedding):
            a, lookups[module] = looked_up(module, args, kwargs, output, lookups.get(module))
            return a, lookups[module]
        sure = self.comparing or module in self._known.checked
        if not sure and not returns_what_it_should(module, a, output):
            raise ValueError(f"{type(module).__name__} does not return what a layer of its kind makes of its input")
        return a, PLAIN

    def _unchanged(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """The input of a module that runs on its own parameters, on one input, for one output."""
        if not isinstance(output, Tensor):
            raise ValueError(f"{type(module).__name__} returns a {type(output).__name__}")
        if any(module._parameters.get(attribute) is not parameter for attribute, parameter in self._own[module]):
            raise ValueError(f"{type(module).__name__} runs on another tensor in its place")
        return input_of(module, args, kwargs)

    def _by_example(self, module: nn.Module, a: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output with the batch in front; a call broadcast over the batch is expanded to it."""
        size, tokens = self._shape
        if size == 1 or (output.ndim >= 2 and output.shape[0] == size):
            return a, output
        self.odd.add(module)
        if output.ndim >= 3 and output.shape[0] == a.shape[0] == 1:
            self.expanded.add(module)
            # a copy, because a model may go on in place
            return a.expand(size, *a.shape[1:]), output.expand(size, *output.shape[1:]).contiguous()
        if output.ndim == 2 and tokens and output.shape[0] == size * tokens:
            return a, output  # (B·T, q), one example after another
        reason = (
            f"its module's input has shape {tuple(a.shape)}; wanted the batch of {size} examples in the first dimension"
        )
        raise UnservedError(dict.fromkeys(self.names[module], reason))

    @property
    def manners(self) -> set[Manner]:
        """How each module was called."""
        times = Counter(module for module, _ in self.calls)
        return {Manner(module, count, module in self.odd) for module, count in times.items()}

    def backward(self, outputs: Tensor, deliver: Deliver, *, again: bool = False) -> None:
        """Send the gradient of `outputs.sum()` down the tape; `deliver` is called on the way, under no_grad."""
        if not outputs.requires_grad:
            raise ValueError(
                "output: it depends on none of the chosen parameters' modules (was it detached, or computed under "
                "no_grad?)"
            )
        self._deliver, self._backward = deliver, True
        missing = self._arrivals.ask(outputs.sum(), self._anchor, self.note, again)
        with torch.no_grad():
            self._hand_over()
        # A gradient that did not come: nothing depends on that output, or it is on a tape of somebody's that does not
        # lead to the anchor (an input that requires grad). The full tap knows which.
        self._expect_none(missing)

    def settle(self) -> None:
        """Look at the calls that were noted, now that the forward is done.

        Raises:
            UnexpectedError: one of them did more than it used to; modules that do have full taps from now on.
        """
        self._expect_none(self._arrivals.settle())

    def _expect_none(self, modules: set[nn.Module]) -> None:
        if modules:
            self._known.slow |= modules
            for module in modules:
                self._quick.pop(module, None)
            raise UnexpectedError

    def leaks(self, outputs: Tensor) -> tuple[set[nn.Module], set[nn.Module]]:
        """Modules through whose rows an example's output depends on rows of another, and those proven not to be.

        The first dimension is then not the batch, or examples meet. Told from the gradients of some of the
        outputs, chosen so that every two examples are apart in one of them; neither is told of a module through
        which no gradient came. The tape is left for another backward.
        """
        size = self._shape.examples
        told: dict[nn.Module, Tensor] = {}  # (2,): whether other examples' rows had a gradient, and whether own rows

        def compare(module: nn.Module, group: int, a: Tensor | None, gradient: Tensor) -> None:
            d = gradient.reshape(size, -1)
            # NaN is no gradient here: 0·∞ in another example's rows is not evidence that examples meet
            reached = torch.stack([(d[~inside].abs() > 0).any(), (d[inside].abs() > 0).any()])
            before = told.get(module)
            told[module] = reached if before is None else before | reached

        for subset in _separating(size):
            inside = subset.to(outputs.device)
            self.backward(outputs[inside], compare, again=True)
        if not told:
            return set(), set()
        leaking, reached = torch.stack([flags.cpu() for flags in told.values()]).T.tolist()
        leaks = {module for module, leak in zip(told, leaking, strict=True) if leak}
        return leaks, {module for module, own in zip(told, reached, strict=True) if own} - leaks


def _nowhere(module: nn.Module, group: int, a: Tensor | None, d: Tensor) -> None:
    """Where deliveries go while there is no backward."""


def _refuse_reentrant(module: nn.Module) -> None:
    """Raises where a call under no_grad is a checkpoint's, which runs again, with a gradient, on the way back."""
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code is CheckpointFunction.forward.__code__:
            raise UnusableError(
                f"{type(module).__name__}: it runs under no_grad inside the model's forward, so no gradient can "
                "reach it; reentrant gradient checkpointing does that (pass use_reentrant=False)"
            )


def _separating(size: int) -> list[Tensor]:
    """Subsets of range(size), masks, such that any example is in one without any other given one."""
    index = torch.arange(size)
    if size <= 3:
        return [index == one for one in range(size)]
    bits = [(index >> bit) & 1 == 1 for bit in range((size - 1).bit_length())]
    return [subset for mask in bits for subset in (mask, ~mask)]
