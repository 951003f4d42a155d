"""What the taps deliver, held to one ordinary backward along a few random directions.

With v of rank one, one set of numbers c_i, and both ways of getting there,

    Σ_i c_i ⟨g_i, v⟩  by the rules, example by example,   against   ⟨∇ Σ_i c_i f_i, v⟩  by autograd,

parameter by parameter. A use that no tap saw, a factor, a hook, an example taken for another: each moves the two
apart by about the size of what it touches.

Of a matrix v = u wᵀ: the rules give Σ_t (u·d_t)(w·a_t) and autograd uᵀ G w, so that neither side needs more than a
product of its streams or its gradient with a vector. A wrong E adds uᵀ E w, of mean zero and variance about |E|², as
under a dense v of random signs. `DIRECTIONS` of them share their w, for G is read once for it, and a u costs nothing
then: E escapes where |E w| < δ|E|, or all the u miss what there is of E w. Of an E = x yᵀ that is |w·y| < δ|y|, no more
often than under a dense v: about δ of the time. Beside its sign, each element of u and w has a size of its own, so that
no two elements of E cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .capture import Deliver, Taps
from .gather import Consume
from .gradients import Packing, Rows, Stream, Vectors
from .known import Manner
from .layers import Site
from .tapping import frozen

DIRECTIONS = 4  # u
# What both sides round away lies within this many roundings of √(Σ_t |d_t|²|a_t|²), the size of a sum of terms of
# random signs: up to twenty are seen, also of examples in two batches, whose products are of other shapes and round
# otherwise; and what is really wrong is off by about the whole of it.
ROUNDINGS = 256
# and a quarter as many of the size of all parameters together: a query's gradient may be what is left of far larger
# ones. Of all batches of the tests' zoo what is right takes up to 0.43 of the two, what is wrong 4 and more.
SHARE = 4
ROUNDINGS_HALF = 16  # of 16-bit streams, where a rounding is a hundredth
FINE = (torch.float32, torch.float64)
Read = dict[tuple[int, bool], tuple[Tensor, Tensor]]  # a's products with w or the u, and |a|² of its rows


class Comparison:
    """Σ_i c_i ⟨g_i, v⟩ over some of a batch's examples by the rules, and what an ordinary backward says of it.

    Attributes:
        rows: the examples, (k,) int64 on the CPU, rising.
        whole: they are all of the batch, and the ordinary backward runs over the same one; otherwise it runs over
            these alone, and agrees only where examples do not meet.
        fine: rounding is expected to be so small that an agreement shows that examples keep apart.
        coarse: a gradient was seen that rounds more than that.
        manners: how the ruled pass called the modules.
    """

    def __init__(self, chosen: Mapping[str, nn.Parameter], rows: Tensor, size: int, fine: bool) -> None:
        """`chosen` are the parameters that rules serve; `size` is the batch's."""
        self._chosen = chosen
        self.rows, self.whole, self._size = rows, len(rows) == size, size
        self.weights = _signs(len(rows), 1, seed=size)[:, 0].double()  # c (k,)
        self.fine, self.coarse = fine, False
        self.manners: set[Manner] = set()
        self._made: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}
        self._picks: dict[int, tuple[Packing, Tensor | slice, Tensor]] = {}
        self._ruled: dict[str, Tensor] = {}
        self._mass: dict[str, Tensor] = {}
        self._eps = 0.0  # of the coarsest gradient: its rounding goes on into all below
        self._uses: dict[str, list[nn.Module]] = {}

    def beside(self, consume: Consume) -> Consume:
        """`consume`, with the streams also met by the directions."""

        def both(sites: list[Site], streams: list[Stream]) -> None:
            read: Read = {}  # of the input that siblings share
            for site, stream in zip(sites, streams, strict=True):
                told, mass = self._told(stream, read)
                self._ruled[site.name] = told + self._ruled.get(site.name, 0)
                if mass is not None:
                    self._mass[site.name] = mass + self._mass.get(site.name, 0)
            consume(sites, streams)

        return both

    def _told(self, stream: Stream, read: Read) -> tuple[Tensor, Tensor | None]:
        """Σ_i c_i ⟨g_i, v⟩ (directions,) in float64, and of a matrix the size of its terms, squared."""
        if isinstance(stream, Vectors):
            rows, weights = self.rows.to(stream.v.device), self.weights.to(stream.v.device)
            return weights @ (stream.v[rows] @ self._left(stream.v, stream.v.shape[1])).double(), None
        index, weights = self._pick(stream.packing, stream.d.device)
        d = _wide(stream.d[index])
        if isinstance(stream, Rows):
            left = self._left(d, stream.table)[stream.ids[index].long()]
            return (weights * (d @ self._right(d, d.shape[1])).double()) @ left.double(), _squares(d).sum()
        key = id(stream.a), stream.transposed
        if key not in read:
            a = _wide(stream.a[index])
            side = self._left if stream.transposed else self._right
            read[key] = (a @ side(a, a.shape[1])).double(), _squares(a)
        along, squares = read[key]
        mass = (_squares(d) * squares).sum()
        if stream.transposed:
            return (weights * (d @ self._right(d, d.shape[1])).double()) @ along, mass
        return (weights * along) @ (d @ self._left(d, d.shape[1])).double(), mass

    def _left(self, like: Tensor, length: int) -> Tensor:
        """u of every direction, (length, directions): the same at each call."""
        return self._signs(like, length, DIRECTIONS)

    def _right(self, like: Tensor, length: int) -> Tensor:
        """w, (length,)."""
        return self._signs(like, length, 1)[:, 0]

    def _signs(self, like: Tensor, length: int, count: int) -> Tensor:
        key = length, count, like.device, like.dtype
        if key not in self._made:
            self._made[key] = _signs(length, count, seed=8 * length + count).to(like.device, like.dtype)
        return self._made[key]

    def _pick(self, packing: Packing, device: torch.device) -> tuple[Tensor | slice, Tensor]:
        """Which rows of a stream are of the examples, and each one's c; kept beside the packing whose name it has."""
        if id(packing) not in self._picks:
            lengths, chosen = packing.lengths, self.rows.numpy()
            starts = lengths.cumsum() - lengths
            first, last = int(chosen[0]), int(chosen[-1])
            index: Tensor | slice
            if last - first == len(chosen) - 1:  # without a copy
                index = slice(int(starts[first]), int(starts[last] + lengths[last]))
            else:
                rows = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in chosen])
                index = torch.from_numpy(rows).to(device)
            weights = np.repeat(self.weights.numpy(), lengths[chosen])
            self._picks[id(packing)] = packing, index, torch.from_numpy(weights).to(device)
        return self._picks[id(packing)][1:]

    def weighing(self, taps: Taps, deliver: Deliver) -> Deliver:
        """`deliver`, noting on the way what gradient came to the examples, and how finely."""
        self.manners = taps.manners

        def weigh(module: nn.Module, group: int, a: Tensor | None, gradient: Tensor) -> None:
            d, names = gradient.detach(), taps.names[module]
            self.coarse |= not is_fine(d)
            self._eps = max(self._eps, self._rounding(d))
            for name in names:
                self._uses.setdefault(name, []).append(module)
            vectors = [name for name in names if self._chosen[name].ndim < 2]
            if vectors:
                own = d.reshape(self._size, -1, d.shape[-1])
                size = _squares(_wide(own if self.whole else own[self.rows.to(d.device)])).sum()
            for name in vectors:
                self._mass[name] = size.to(self._chosen[name].device) + self._mass.get(name, 0)
            deliver(module, group, a, gradient)

        return weigh

    def _rounding(self, d: Tensor) -> float:
        if not is_fine(d):
            return ROUNDINGS_HALF * (2.0**-10 if d.dtype == torch.float32 else torch.finfo(d.dtype).eps)
        # many norms compute in fp32 even in float64
        return torch.finfo(torch.float32).eps * ROUNDINGS

    @property
    def separated(self) -> set[Manner]:
        """How modules were called of which an agreement shows that examples keep apart: with a gradient in theirs."""
        if not self.fine or self.coarse or self._size == 1:
            return set()
        modules = self.reached()
        return {manner for manner in self.manners if manner.module in modules}

    def reached(self) -> set[nn.Module]:
        """Modules through which a gradient came to the examples, so that an agreement says something of them."""
        if not self._mass:
            return set()
        masses = torch.stack([mass.cpu() for mass in self._mass.values()]).tolist()
        # of a parameter that several modules use, the gradient may have come through some of them alone
        return {
            module
            for name, mass in zip(self._mass, masses, strict=True)
            if mass > 0 and len(set(self._uses[name])) == 1
            for module in self._uses[name]
        }

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
            G = _wide(gradient.to_dense() if gradient.is_sparse else gradient)
            along = G if G.ndim < 2 else G @ self._right(G, G.shape[1])
            ordinary[name] = along.double() @ self._left(G, G.shape[0]).double()
            # in its place something without memory, or autograd would gather every weight's gradient
            return gradient.new_zeros(()).expand(gradient.shape)

        hook.only_reads = True  # type: ignore[attr-defined]
        return hook

    def _differences(self, names: Sequence[str], ordinary: Mapping[str, Tensor]) -> dict[str, str]:
        def column(found: Mapping[str, Tensor], length: int) -> Tensor:
            zero = torch.zeros(length, dtype=torch.float64)
            return torch.stack([found[n].double().cpu().expand(length) if n in found else zero for n in names])

        ruled, plain = column(self._ruled, DIRECTIONS), column(ordinary, DIRECTIONS)
        mass = column(self._mass, 1)
        off = (ruled - plain).abs()
        size = mass.sqrt().maximum(plain.abs())
        # a gradient may itself be what rounding left of larger ones (attention to a single token)
        allowed = self._eps * (size + mass.sum().sqrt() / SHARE)
        # NaN and ∞ have no distance; both ways have them where the model does
        beyond = off.isfinite() & (off > allowed)
        wrong = beyond.any(1).nonzero().flatten().tolist()
        if not wrong:
            return {}
        worst = float((off / size.clamp_min(1e-300))[beyond].max())
        reason = f"one ordinary backward gives another gradient, by up to {worst:.2g} of its size"
        return {names[n]: reason for n in wrong}


def is_fine(x: Tensor) -> bool:
    """Whether products in its dtype round so little that the same examples in two batches can be compared."""
    tf32 = x.dtype == torch.float32 and x.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return x.dtype in FINE and not tf32


def _signs(length: int, count: int, seed: int) -> Tensor:
    """(length, count): random signs, and sizes from a half to one and a half."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (length, count), generator=generator) * 2.0 - 1
    return sign * (0.5 + torch.rand(length, count, generator=generator))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _squares(x: Tensor) -> Tensor:
    """|x|² of every row, float64."""
    return torch.linalg.vector_norm(x, dim=-1).double().square()


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
