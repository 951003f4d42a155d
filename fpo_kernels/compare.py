"""What the taps deliver, held to one ordinary backward along a random direction.

With v of random signs, one set of numbers c_i, and both ways of getting there,

    Σ_i c_i ⟨g_i, v⟩  by the rules, example by example,   against   ⟨∇ Σ_i c_i f_i, v⟩  by autograd,

parameter by parameter. A use that no tap saw, a factor, a hook, an example taken for another: each moves the two
apart by about the size of what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .capture import Delivery, Taps, frozen
from .gradients import Stream
from .layers import Site

# What both sides round away lies within this many roundings of √(Σ_t |d_t|²|a_t|²), the size of a sum of terms of
# random signs: a few are seen, and what is really wrong is off by about the whole of it.
ROUNDINGS = 256
SHARE = 16  # and a sixteenth as many of the size of all parameters together
ROUNDINGS_HALF = 16  # of 16-bit streams, where a rounding is a hundredth


class Comparison:
    """One batch's Σ_i c_i ⟨g_i, v⟩ by the rules, and what an ordinary backward says of it."""

    def __init__(self, chosen: Mapping[str, nn.Parameter], size: int) -> None:
        """`chosen` are the parameters that rules serve; `size` is the batch's."""
        self._chosen = chosen
        generator = torch.Generator().manual_seed(size)
        sign = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
        self.weights = (sign * (0.5 + torch.rand(size, generator=generator))).double()  # c (B,)
        self._ruled: dict[str, Tensor] = {}
        self._mass: dict[str, Tensor] = {}
        self._eps: dict[str, float] = {}

    def vector(self, name: str) -> Tensor:
        """v of a parameter: signs, the same at each call."""
        parameter = self._chosen[name]
        generator = torch.Generator(parameter.device).manual_seed(1 + list(self._chosen).index(name))
        signs = torch.randint(0, 2, parameter.shape, generator=generator, device=parameter.device, dtype=torch.int8)
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return signs.to(wide).mul_(2).sub_(1)

    def consume(self, sites: list[Site], streams: list[Stream]) -> None:
        """A `gather.Consume`."""
        for site, stream in zip(sites, streams, strict=True):
            along = stream.direction(self.vector(site.name)).double()
            told = along @ self.weights.to(along.device)
            self._ruled[site.name] = told + self._ruled.get(site.name, 0)

    def weighing(self, taps: Taps, deliver: Callable[[Delivery], None]) -> Callable[[Delivery], None]:
        """`deliver`, noting on the way how large the terms are that a parameter's gradient adds up."""

        def weigh(delivery: Delivery) -> None:
            d = delivery.d.detach()
            rows = d.double().square().flatten(0, -2).sum(1)
            a = delivery.a
            if isinstance(delivery.module, nn.Embedding) or a is None or a.shape[:-1] != d.shape[:-1]:
                of_weight = rows.sum()
            else:
                of_weight = (rows * a.double().square().flatten(0, -2).sum(1).clamp_min(1)).sum()
            for name in taps.names[delivery.module]:
                mass = rows.sum() if self._chosen[name].ndim < 2 else of_weight
                self._mass[name] = self._mass.get(name, 0) + mass.to(self._chosen[name].device)
                self._eps[name] = max(self._eps.get(name, 0.0), _rounding(d))
            deliver(delivery)

        return weigh

    def faults(self, model: nn.Module, outputs: Callable[[], Tensor], before: Tensor) -> dict[str, str]:
        """Name → reason of the parameters that an ordinary backward tells otherwise; runs the model once.

        Raises:
            ValueError: the outputs are not those, `before`, of the pass that was ruled.
        """
        names = list(self._chosen)
        ordinary: dict[str, Tensor] = {}
        handles = []
        with frozen(model, self._chosen.values()), torch.enable_grad():
            try:
                for name, parameter in self._chosen.items():
                    handles.append(parameter.register_hook(self._along(name, ordinary)))
                now = outputs()
                _refuse_another(now, before)
                if now.requires_grad:
                    scalar = (now.double() * self.weights.to(now.device)).sum()
                    torch.autograd.grad(scalar, list(self._chosen.values()), allow_unused=True)
            finally:
                for handle in handles:
                    handle.remove()
        return self._differences(names, ordinary)

    def _along(self, name: str, ordinary: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            vector = self.vector(name)
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            ordinary[name] = (dense.to(vector.dtype) * vector).sum(dtype=torch.float64)
            # in its place something without memory, or autograd would gather every weight's gradient
            return gradient.new_zeros(()).expand(gradient.shape)

        hook.only_reads = True  # type: ignore[attr-defined]
        return hook

    def _differences(self, names: Sequence[str], ordinary: Mapping[str, Tensor]) -> dict[str, str]:
        zero = torch.zeros((), dtype=torch.float64)
        columns = [
            [torch.as_tensor(found.get(name, zero)).double().cpu() for name in names]
            for found in (self._ruled, ordinary, self._mass)
        ]
        ruled, plain, mass = (torch.stack(column) for column in columns)
        off = (ruled - plain).abs()
        size = mass.sqrt().maximum(plain.abs())
        # a gradient may itself be what rounding left of larger ones (attention to a single token)
        allowed = torch.tensor([self._eps.get(name, 0.0) for name in names]) * (size + mass.sum().sqrt() / SHARE)
        # NaN and ∞ have no distance; both ways have them where the model does
        wrong = (off.isfinite() & (off > allowed)).nonzero().flatten().tolist()
        if not wrong:
            return {}
        worst = float((off / size.clamp_min(1e-300))[wrong].max())
        reason = f"one ordinary backward gives another gradient, by up to {worst:.2g} of its size"
        return {names[n]: reason for n in wrong}


def _rounding(d: Tensor) -> float:
    if d.dtype == torch.float32 and d.is_cuda and torch.get_float32_matmul_precision() != "highest":
        return ROUNDINGS_HALF * 2.0**-10  # TF32
    eps = max(torch.finfo(d.dtype).eps, torch.finfo(torch.float32).eps)  # many norms compute in fp32 even in float64
    return eps * (ROUNDINGS if d.dtype in (torch.float32, torch.float64) else ROUNDINGS_HALF)


def close(now: Tensor, before: Tensor) -> bool:
    """Whether two runs gave the same outputs, but for what other shapes of the same products round otherwise."""
    off = (now.detach().double() - before.detach().double()).norm()
    return not bool(off > torch.finfo(now.dtype).eps ** 0.5 * before.detach().double().norm())


def _refuse_another(now: Tensor, before: Tensor) -> None:
    if not close(now, before):
        raise ValueError(
            "output: the same batch gave other scalars when it was run again: the model keeps something from call to "
            "call, draws at random, or changes what it is given"
        )
