"""Identity taps: hand a module's input and output gradient over while a backward pass runs.

A tapped module's output passes through an autograd identity that keeps the module's input (through
autograd's own saved tensors, so that checkpointing recomputes it instead of keeping it) and calls back
with (a, d) when the output's gradient d arrives. All parameters are frozen meanwhile: no weight gradient
is ever computed, and nothing below the lowest tap is put on the tape.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .layers import Lookup, Site, input_of, looked_up, returns_what_it_should, some_rows
from .remake import Node, maker_of, remade
from .uses import Uses

PLAIN = Lookup()


class UnservedError(Exception):
    """What a pass found out about chosen parameters that the modules' kinds did not tell: name → reason."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        self.reasons = dict(reasons)


class UnusableError(RuntimeError):
    """A model through which no gradient can come as it stands, whoever asks; the message says what to do."""


class Shape(NamedTuple):
    """How many examples a batch holds, and how many tokens each (None where its entries do not say)."""

    examples: int
    tokens: int | None


class Delivery(NamedTuple):
    """One use of a module. Deliveries of one `group` read the same input tensor."""

    module: nn.Module
    group: int
    a: Tensor | None  # (B, …, p) its input, or (B, …) ids; None where no rule reads it
    d: Tensor  # (B, …, q) the gradient of its output


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


class Manner(NamedTuple):
    """How a pass calls a module: how often, and whether ever without the batch in front."""

    module: nn.Module
    times: int
    odd: bool


class Known:
    """What earlier passes saw of the modules, and what need not be looked at again.

    Attributes:
        checked: modules that return what their rules suppose.
        separable: of those, how they were called when they were seen to keep two or more examples apart.
        lookups: what an embedding does with the rows it looks up.
        remade: modules whose input was seen to come out the same when it is multiplied again (`remake`).
    """

    def __init__(self) -> None:
        self.checked: set[nn.Module] = set()
        self.separable: set[Manner] = set()
        self.lookups: dict[nn.Module, Lookup] = {}
        self.remade: set[nn.Module] = set()


class Taps:
    """What a forward pass under `tapped` left behind: each use of a module in order, and the way back.

    Attributes:
        calls: (module, group) of every use of a tapped module.
        names: module → the chosen parameters it serves.
        idle: outputs are passed on untouched.
        expanded: modules whose call was broadcast over the batch and went on expanded to it.
        untaped: modules with a call under no_grad, which adds nothing to any gradient.
        inner: modules through which the forward itself took a gradient that can be differentiated again.
        uses: counts the uses of the sites' parameters while it is entered.
    """

    def __init__(self, sites: Sequence[Site], shape: Shape, device: torch.device, known: Known) -> None:
        self.calls: list[tuple[nn.Module, int]] = []
        self.expanded: set[nn.Module] = set()
        self.untaped: set[nn.Module] = set()
        self.inner: set[nn.Module] = set()
        self._odd: set[nn.Module] = set()
        self.idle = False
        self.uses = Uses(sites)
        self.names: dict[nn.Module, list[str]] = {}
        self._own: dict[nn.Module, list[tuple[str, Tensor]]] = {}
        self._reads: set[nn.Module] = set()
        for site in sites:
            for module, rule in site.rules.items():
                self.names.setdefault(module, []).append(site.name)
                self._own.setdefault(module, []).append((rule.attribute, site.parameter))
                if rule.reads_input:
                    self._reads.add(module)
        self._deliver: Callable[[Delivery], None] = lambda delivery: None
        self._known = known
        self._shape = shape
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        # id → an input, its version, where it lies, and its group
        self._inputs: dict[int, tuple[weakref.ref[Tensor], int, int, int]] = {}
        self._latest: tuple[int, Tensor] | None = None  # the input made last, and its group
        self._backward = False

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: pass the output through an identity that remembers the input."""
        if self.idle:
            return output
        if not torch.is_grad_enabled():
            _refuse_reentrant(module)
            self.untaped.add(module)
            return output
        try:
            if torch._C._are_functorch_transforms_active():
                raise ValueError("it is called inside a torch.func transform")
            if module in self._known.checked and not isinstance(module, nn.Embedding):
                a, lookup = self._unchanged(module, args, kwargs, output), PLAIN
            else:
                with self.uses.paused(), torch.no_grad():
                    a, lookup = self._checked(module, args, kwargs, output)
        except ValueError as problem:
            raise UnservedError(dict.fromkeys(self.names[module], str(problem))) from None
        except (TypeError, KeyError, AttributeError, IndexError, RuntimeError) as problem:
            self._unreadable(module, "what it was called with", problem)
        group, given = self._group(a), a
        a, output = self._by_example(module, a.detach(), output)
        node = self._maker(module, given) if module in self._reads and a.shape == given.shape else None
        if not self._backward:  # under checkpointing the forward runs again during backward
            self.calls.append((module, group))

        def deliver(a: Tensor | None, d: Tensor) -> None:
            if not self._backward:
                if torch.is_grad_enabled():  # create_graph: the weight acts in that gradient too
                    self.inner.add(module)
                return
            kind = d.device.type
            a = a if node is None else self._remade(node, group)
            with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
                try:
                    self._deliver(Delivery(module, group, a, lookup.gradient(a, d)))
                except (TypeError, KeyError, AttributeError, IndexError, ValueError) as problem:
                    self._unreadable(module, "its input and the gradient of its output", problem)

        return _Tap.apply(output, self._anchor, a if module in self._reads and node is None else None, deliver)

    def _maker(self, module: nn.Module, a: Tensor) -> Node | None:
        """What makes the input again, once a pass has seen that it comes out the same."""
        with self.uses.paused():
            node = maker_of(a)
            if node is not None and module not in self._known.remade:
                if torch.equal(remade(node, some_rows), some_rows(a)):
                    self._known.remade.add(module)
                return None
        return node

    def _remade(self, node: Node, group: int) -> Tensor:
        if self._latest is None or self._latest[0] != group:  # siblings come one after another
            self._latest = group, remade(node)
        return self._latest[1]

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
        if module not in self._known.checked and not returns_what_it_should(module, a, output):
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
        self._odd.add(module)
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
        return {Manner(module, count, module in self._odd) for module, count in times.items()}

    def _group(self, given: Tensor) -> int:
        state = given._version, given.data_ptr()
        known = self._inputs.get(id(given))
        if known is not None and known[0]() is given and known[1:3] == state:
            return known[3]
        self._inputs[id(given)] = weakref.ref(given), *state, len(self.calls)
        return len(self.calls)

    def backward(self, outputs: Tensor, deliver: Callable[[Delivery], None], *, again: bool = False) -> None:
        """Send the gradient of `outputs.sum()` down the tape; `deliver` is called on the way, under no_grad."""
        if not outputs.requires_grad:
            raise ValueError(
                "output: it depends on none of the chosen parameters' modules (was it detached, or computed under "
                "no_grad?)"
            )
        self._deliver, self._backward = deliver, True
        torch.autograd.grad(outputs.sum(), self._anchor, allow_unused=True, retain_graph=again)

    def leaks(self, outputs: Tensor) -> tuple[set[nn.Module], set[nn.Module]]:
        """Modules through whose rows an example's output depends on rows of another, and those proven not to be.

        The first dimension is then not the batch, or examples meet. Told from the gradients of some of the
        outputs, chosen so that every two examples are apart in one of them; neither is told of a module through
        which no gradient came. The tape is left for another backward.
        """
        size = self._shape.examples
        told: dict[nn.Module, Tensor] = {}  # (2,): whether other examples' rows had a gradient, and whether own rows

        def compare(delivery: Delivery) -> None:
            d = delivery.d.reshape(size, -1)
            # NaN is no gradient here: 0·∞ in another example's rows is not evidence that examples meet
            reached = torch.stack([(d[~inside].abs() > 0).any(), (d[inside].abs() > 0).any()])
            before = told.get(delivery.module)
            told[delivery.module] = reached if before is None else before | reached

        for subset in _separating(size):
            inside = subset.to(outputs.device)
            self.backward(outputs[inside], compare, again=True)
        if not told:
            return set(), set()
        leaking, reached = torch.stack([flags.cpu() for flags in told.values()]).T.tolist()
        leaks = {module for module, leak in zip(told, leaking, strict=True) if leak}
        return leaks, {module for module, own in zip(told, reached, strict=True) if own} - leaks


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


@contextmanager
def frozen(model: nn.Module, learning: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """No parameter requires grad but the given ones; they, and buffers, as before afterwards, whatever happens."""
    wanted = {id(parameter) for parameter in learning}
    modules = list(model.modules())  # walking the tree takes longer than what is done on the way
    with ExitStack() as stack:
        for parameter in dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None):
            if parameter.requires_grad != (id(parameter) in wanted):
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(id(parameter) in wanted)
        for module in modules:
            if module.training:  # spectral norms and their likes keep count as they run
                for buffer in module.buffers(recurse=False):
                    stack.callback(_put_back, buffer, buffer._version, buffer.clone())
        yield


def _put_back(buffer: Tensor, version: int, before: Tensor) -> None:
    if buffer._version != version:
        with torch.no_grad():
            buffer.copy_(before)


_running: list[Taps] = []  # passes that are under way, the innermost last


@contextmanager
def tapped(model: nn.Module, sites: Sequence[Site], shape: Shape, known: Known) -> Iterator[Taps]:
    """Taps on the sites' modules for one forward and `Taps.backward`; the model is restored whatever happens.

    Within another pass, of an output map that asks an engine of its own, the outer taps stand idle.
    """
    first = next(model.parameters(), None)
    taps = Taps(sites, shape, first.device if first is not None else torch.device("cpu"), known)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for module in taps.names:
            # first in line: a user's own hook may change the output, and d belongs to what the module made
            handle = module.register_forward_hook(taps.hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        for module in model.modules():
            # of a parametrised weight, asking for it would already be a step (spectral norm's)
            if getattr(module._parameters.get("weight"), "quant_state", None) is not None:
                stack.callback(module.register_forward_hook(_passes_gradients, with_kwargs=True).remove)
        # torch's fused encoder layers, taken where no weight requires grad, call none of their modules
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for outer in _running:
            stack.callback(setattr, outer, "idle", outer.idle)
            outer.idle = True
            stack.enter_context(outer.uses.paused())
        _running.append(taps)
        stack.callback(_running.pop)
        stack.enter_context(torch.enable_grad())
        yield taps


def _passes_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
    """Forward hook: bitsandbytes' 4-bit layers drop the gradient once they are packed for inference on a CPU."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if any(x.requires_grad for x in given) and not output.requires_grad:
        raise UnusableError(
            f"{type(module).__name__} passes no gradient on: its quantised weight was packed for inference, as "
            "bitsandbytes does on CPUs with AVX512-BF16 in eval mode; load the model again and call model.train() "
            "(without dropout) before the first forward"
        )
