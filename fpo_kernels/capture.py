"""Identity taps: hand a module's input and output gradient over while a backward pass runs.

A tapped module's output passes through an autograd identity that keeps the module's input (through
autograd's own saved tensors, so that checkpointing recomputes it instead of keeping it) and calls back
with (a, d) when the output's gradient d arrives. All parameters are frozen meanwhile: no weight gradient
is ever computed, and nothing below the lowest tap is put on the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .batches import Batch, rows_of
from .factors import Factors, interleave, offsets_of
from .layers import Site

Deliver = Callable[[nn.Module, Tensor, Tensor], None]
Consume = Callable[[Site, Factors], None]


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
    """What a forward pass under `tapped` left behind: how often each module ran, and the way back."""

    def __init__(self, deliver: Deliver, device: torch.device) -> None:
        self.deliver = deliver
        self.calls: dict[nn.Module, int] = {}
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: pass the output through an identity that remembers the input."""
        a = input_of(args, kwargs)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(module).__name__}: it runs under no_grad inside the model's forward, so no gradient can "
                "reach it; reentrant gradient checkpointing does that (pass use_reentrant=False)"
            )
        self.calls[module] = self.calls.get(module, 0) + 1

        def deliver(a: Tensor, d: Tensor) -> None:
            with torch.no_grad():
                self.deliver(module, a, d)

        return _Tap.apply(output, self._anchor, a.detach(), deliver)

    def backward(self, outputs: Tensor) -> None:
        """Send the gradient of `outputs.sum()` down the tape; each tap delivers on the way."""
        if not outputs.requires_grad:
            raise ValueError("output: it depends on none of the chosen parameters' modules (was it detached?)")
        torch.autograd.grad(outputs.sum(), self._anchor, allow_unused=True)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A module's input, passed by place or by name."""
    return args[0] if args else kwargs["input"]


@contextmanager
def tapped(model: nn.Module, modules: Iterable[nn.Module], deliver: Deliver) -> Iterator[Taps]:
    """Taps on `modules` for one forward and `Taps.backward`; the model is restored whatever happens.

    `deliver(module, a, d)` is called once for each use of a module in the forward whose output reaches
    the differentiated scalar, in backward order and under no_grad: a is the module's input, d the gradient
    of its output.
    """
    first = next(model.parameters(), None)
    taps = Taps(deliver, first.device if first is not None else torch.device("cpu"))
    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
        for module in modules:
            # first in line: a user's own hook may change the output, and d belongs to what the module made
            handle = module.register_forward_hook(taps.hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        yield taps


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
        self.count: dict[str, int] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in _flat([out])):  # sizes, dtypes and devices are no use of its values
            for name in {self._names[id(x)] for x in _flat([*args, *(kwargs or {}).values()]) if id(x) in self._names}:
                self.count[name] = self.count.get(name, 0) + 1
        return out

    def check(self, calls: dict[nn.Module, int], sites: Iterable[Site]) -> None:
        """Refuse parameters that are also used outside their modules' calls, where no tap sees them."""
        for site in sites:
            if self.count.get(site.name, 0) > sum(calls.get(module, 0) for module in site.modules):
                raise ValueError(
                    f"{site.name}: chosen, but used outside its module's call (functionally, or by another "
                    "method), so its gradient cannot be told apart by example. Leave it out of `parameters`."
                )


class Gather:
    """Joins what the taps deliver into one packed stream a parameter and passes it on when complete."""

    def __init__(self, sites: list[Site], batch: Batch, consume: Consume) -> None:
        self.consume = consume
        self.size = rows_of(batch)
        self.square: set[nn.Module] = set()  # modules whose input has as many tokens as examples
        self._sites = sites
        self._sites_of: dict[nn.Module, list[Site]] = {}
        for site in sites:
            for module in dict.fromkeys(site.modules):
                self._sites_of.setdefault(module, []).append(site)
        self._parts: dict[str, list[Factors]] = {}
        self._missing: dict[str, int] = {}
        mask = batch.get("attention_mask")
        self._padding: tuple[Tensor, Tensor] | None = None  # where tokens are (B, T), and how many (B,)
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            self._padding = mask.bool(), mask.bool().sum(1)

    @property
    def modules(self) -> Iterable[nn.Module]:
        """What has to be tapped."""
        return self._sites_of.keys()

    def start(self, calls: dict[nn.Module, int]) -> None:
        """Learn from the forward's call counts how many deliveries complete each parameter."""
        silent = [s.name for s in self._sites if not any(calls.get(module) for module in s.modules)]
        if silent:
            raise ValueError(
                f"{', '.join(silent[:5])}{' …' if len(silent) > 5 else ''}: chosen, but its module was not "
                "called in the forward pass, so its gradient cannot be seen. Leave it out of `parameters`."
            )
        self._missing = {s.name: sum(calls.get(module, 0) for module in s.modules) for s in self._sites}

    def deliver(self, module: nn.Module, a: Tensor, d: Tensor) -> None:
        """A tap's callback: pack one call's (a, d) and pass complete parameters on."""
        packed = self._pack(module, a, d)
        for site in self._sites_of[module]:
            self._parts.setdefault(site.name, []).append(packed)
            self._missing[site.name] -= 1
            if not self._missing[site.name]:
                self._pass_on(site)

    def finish(self) -> None:
        """Pass on what is left: parameters of which some calls did not reach the output."""
        for site in self._sites:
            if site.name in self._parts:
                self._pass_on(site)

    def _pass_on(self, site: Site) -> None:
        self.consume(site, interleave(self._parts.pop(site.name)))

    def _pack(self, module: nn.Module, a: Tensor, d: Tensor) -> Factors:
        if a.ndim < 2 or a.shape[0] != self.size:
            named = ", ".join(site.name for site in self._sites_of[module])
            raise ValueError(
                f"{named}: its module's input has shape {tuple(a.shape)}; wanted the batch of {self.size} "
                "examples in the first dimension"
            )
        if a.ndim >= 3 and a.shape[1] == self.size > 1:
            self.square.add(module)
        common = torch.promote_types(a.dtype, d.dtype)
        a, d = a.to(common), d.to(common)
        mask, tokens = self._padding or (None, None)
        by_token = mask is not None and a.ndim >= 3 and a.shape[1] == mask.shape[1]
        # Padding has no gradient in a model that respects its mask; of one that does not, every row counts.
        if mask is not None and tokens is not None and by_token and not d[~mask].any():
            counts = tokens * (a[0, 0].numel() // a.shape[-1])
            return Factors(a[mask].flatten(0, -2), d[mask].flatten(0, -2), offsets_of(counts))
        counts = torch.full((self.size,), a[0].numel() // a.shape[-1], device=a.device)
        return Factors(a.flatten(0, -2), d.flatten(0, -2), offsets_of(counts))
