"""Identity taps: hand a module's input and output gradient over while a backward pass runs.

A tapped module's output passes through an autograd identity that keeps the module's input (through
autograd's own saved tensors, so that checkpointing recomputes it instead of keeping it) and calls back
with (a, d) when the output's gradient d arrives. All parameters are frozen meanwhile: no weight gradient
is ever computed, and nothing below the lowest tap is put on the tape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layers import Site, looked_up


class UnservedError(Exception):
    """What a pass found out about chosen parameters that the modules' kinds did not tell: name → reason."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        self.reasons = dict(reasons)


class Shape(NamedTuple):
    """How many examples a batch holds, and how many tokens each (None where its entries do not say)."""

    examples: int
    tokens: int | None


class Delivery(NamedTuple):
    """One use of a module. Deliveries of one `group` read the same input tensor."""

    module: nn.Module
    group: int
    a: Tensor  # (B, …, p) its input, or (B, …) ids
    d: Tensor  # (B, …, q) the gradient of its output


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, a: Tensor, deliver: Callable[[Tensor, Tensor], None]):
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
        idle: outputs are passed on untouched.
        expanded: modules whose call was broadcast over the batch and went on expanded to it.
        uses: counts the uses of the sites' parameters while it is entered.
    """

    def __init__(self, sites: Sequence[Site], shape: Shape, device: torch.device) -> None:
        self.calls: list[tuple[nn.Module, int]] = []
        self.expanded: set[nn.Module] = set()
        self.idle = False
        self.deliver: Callable[[Delivery], None] = lambda delivery: None
        self.uses = Uses(sites)
        self.names: dict[nn.Module, list[str]] = {}
        for site in sites:
            for module in site.rules:
                self.names.setdefault(module, []).append(site.name)
        self._shape = shape
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._inputs: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # id → input, its version and group
        self._backward = False

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: pass the output through an identity that remembers the input."""
        if self.idle:
            return output
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(module).__name__}: it runs under no_grad inside the model's forward, so no gradient can "
                "reach it; reentrant gradient checkpointing does that (pass use_reentrant=False)"
            )
        a = given = args[0] if args else next(iter(kwargs.values()))
        scale = 1.0
        if isinstance(module, nn.Embedding):
            try:
                with self.uses.paused():
                    a, scale = looked_up(module, args, kwargs, output)
                    given = a
            except ValueError as problem:
                raise UnservedError(dict.fromkeys(self.names[module], str(problem))) from None
        a, output = self._by_example(module, a.detach(), output)
        group = self._group(given)
        if not self._backward:  # under checkpointing the forward runs again during backward
            self.calls.append((module, group))

        def deliver(a: Tensor, d: Tensor) -> None:
            with torch.no_grad(), torch.autocast(d.device.type, enabled=False):
                self.deliver(Delivery(module, group, a, d if scale == 1 else d * scale))

        return _Tap.apply(output, self._anchor, a, deliver)

    def _by_example(self, module: nn.Module, a: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output with the batch in front; a call broadcast over the batch is expanded to it."""
        size, tokens = self._shape
        if size == 1 or (output.ndim >= 2 and output.shape[0] == size):
            return a, output
        if output.ndim >= 3 and output.shape[0] == a.shape[0] == 1:
            self.expanded.add(module)
            return a.expand(size, *a.shape[1:]), output.expand(size, *output.shape[1:])
        if output.ndim == 2 and tokens and output.shape[0] == size * tokens:
            return a, output  # (B·T, q), one example after another
        reason = (
            f"its module's input has shape {tuple(a.shape)}; wanted the batch of {size} examples in the first dimension"
        )
        raise UnservedError(dict.fromkeys(self.names[module], reason))

    def _group(self, given: Tensor) -> int:
        known = self._inputs.get(id(given))
        if known is not None and known[0]() is given and known[1] == given._version:
            return known[2]
        self._inputs[id(given)] = weakref.ref(given), given._version, len(self.calls)
        return len(self.calls)

    def backward(self, outputs: Tensor, deliver: Callable[[Delivery], None], *, again: bool = False) -> None:
        """Send the gradient of `outputs.sum()` down the tape; `deliver` is called on the way, under no_grad."""
        if not outputs.requires_grad:
            raise ValueError("output: it depends on none of the chosen parameters' modules (was it detached?)")
        self.deliver, self._backward = deliver, True
        torch.autograd.grad(outputs.sum(), self._anchor, allow_unused=True, retain_graph=again)

    def leaks(self, outputs: Tensor, look: Callable[[Delivery], None]) -> set[nn.Module]:
        """Modules through whose rows an example's output depends on rows of another example.

        The first dimension is then not the batch, or examples meet. Told from the gradient of one output, which
        leaves the tape for another backward; `look` sees each delivery too.
        """
        size = self._shape.examples
        one = size // 2  # neither the first nor the last of three: a model may treat those in their own way
        found: dict[nn.Module, Tensor] = {}

        def compare(delivery: Delivery) -> None:
            look(delivery)
            d = delivery.d.reshape(size, -1)
            leak = (d[:one] != 0).any() | (d[one + 1 :] != 0).any()
            found[delivery.module] = found[delivery.module] | leak if delivery.module in found else leak

        self.backward(outputs[one], compare, again=True)
        return {module for module, leak in found.items() if bool(leak)}


@contextmanager
def frozen(model: nn.Module, learning: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """No parameter requires grad but the given ones; as before afterwards, whatever happens."""
    wanted = {id(parameter) for parameter in learning}
    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad != (id(parameter) in wanted):
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(id(parameter) in wanted)
        yield


@contextmanager
def tapped(model: nn.Module, sites: Sequence[Site], shape: Shape) -> Iterator[Taps]:
    """Taps on the sites' modules for one forward and `Taps.backward`; the model is restored whatever happens."""
    first = next(model.parameters(), None)
    taps = Taps(sites, shape, first.device if first is not None else torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for module in taps.names:
            # first in line: a user's own hook may change the output, and d belongs to what the module made
            handle = module.register_forward_hook(taps.hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        for module in model.modules():
            if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
                stack.callback(module.register_forward_hook(_passes_gradients, with_kwargs=True).remove)
        stack.enter_context(torch.enable_grad())
        yield taps


def _passes_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
    """Forward hook: bitsandbytes' 4-bit layers drop the gradient once they are packed for inference on a CPU."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if any(x.requires_grad for x in given) and not output.requires_grad:
        raise RuntimeError(
            f"{type(module).__name__} passes no gradient on: its quantised weight was packed for inference, as "
            "bitsandbytes does on CPUs with AVX512-BF16 in eval mode; load the model again and call model.train() "
            "(without dropout) before the first forward"
        )


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, those in lists and tuples (torch.cat's, chunk's) one by one."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


class Uses(TorchFunctionMode):
    """Counts the torch functions that turn a parameter into a tensor: a module's own call is one."""

    def __init__(self, sites: Iterable[Site]) -> None:
        super().__init__()
        self._names = {id(site.parameter): site.name for site in sites}
        self._paused = False
        self.count: dict[str, int] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without counting: what a tap looks up for itself is no use of the model's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not self._paused and any(
            isinstance(x, Tensor) for x in _flat([out])
        ):  # sizes, dtypes and devices are no use of its values
            for name in {self._names[id(x)] for x in _flat([*args, *(kwargs or {}).values()]) if id(x) in self._names}:
                self.count[name] = self.count.get(name, 0) + 1
        return out

    def outside(self, calls: Mapping[nn.Module, int], sites: Iterable[Site]) -> dict[str, str]:
        """Name → reason of parameters that are also used outside their modules' calls, where no tap sees them."""
        return {
            site.name: "used outside its module's call (functionally, or by another method)"
            for site in sites
            if self.count.get(site.name, 0) > sum(calls.get(module, 0) for module in site.rules)
        }
