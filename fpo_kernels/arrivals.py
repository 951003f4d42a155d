"""Calls that are only noted, and the gradients that the tape is asked for once it is whole.

Of a module that earlier passes saw to be plain, a pass needs no node on the tape and no hook: its output says where
its gradient will arrive. Where all of them take little room outputs are kept, looked at when the forward is done, and
the tape is asked for their gradients together: a fraction of what two calls of Python each would take in its midst.
Else each is looked at as it comes, its gradient met where it arrives, and let go of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from .known import Current, Quick
from .reached import linear
from .remake import Inputs, Node, are_saved_plainly, is_cast, maker_of

# Of a norm's outputs in 16 bits one in so many is made again, the others are kept. Made again by torch's two kernels,
# all of an 8B model's took 8.3 ms at 9 × 512 tokens on an H200, a thirty-fourth of the pass; kept, 0.115 of the
# backward's peak. The one kernel of `remake_triton` has not been timed.
ONE_IN = 4
_are_transformed = torch._C._are_functorch_transforms_active
_new: Any = tuple.__new__  # a named tuple's own takes twice as long
Note = Callable[[int, nn.Module, int, "Tensor | None", Tensor], None]


class Noted(NamedTuple):
    """A call: what it read, and where the gradient of its output arrives.

    Attributes:
        turn: among all calls. module: what was called. group: calls of one group read the same input.
        a: the input, at `version`; None where no rule reads it, or where `maker` makes it again.
        output: where it is kept; else the tape's node, `number` which of its gradients, and the output's shape where
            the node's is another.
    """

    turn: int
    module: nn.Module
    group: int
    a: Tensor | None
    version: int
    maker: Node | None
    output: Tensor | None
    node: Node | None
    number: int
    shape: torch.Size | None

    def a_as_read(self) -> Tensor | None:
        """The input, if it is what it was; a model that goes on in place would change what the gradient is of."""
        if self.a is not None and self.a._version != self.version:
            raise RuntimeError(
                f"{type(self.module).__name__}: what it read was modified by an inplace operation before its gradient "
                "came; the model has to make a copy"
            )
        return self.a

    def shaped(self, d: Tensor) -> Tensor:
        """The output's gradient."""
        if self.shape is None:
            return d
        return d.view(self.shape) if d.is_contiguous() else d.reshape(self.shape)


class Arrivals:
    """The noted calls of one pass.

    Attributes:
        size: the batch's. calls: (module, group) of each. most_bytes: beyond them nothing is kept at once.
        bytes: what keeping all of them takes, inputs and gradients, with those of other taps.
        open: calls are noted; not where taps stand idle, and not once the way back has begun.
        waiting: those not yet looked at: turn, module, input and its version, output and its version.
    """

    def __init__(self, size: int, inputs: Inputs, calls: list[tuple[nn.Module, int]], most_bytes: int) -> None:
        """`size` is the batch's; `calls` takes (module, group) of each; beyond `most_bytes` nothing is kept at once."""
        self.size, self._inputs, self.calls, self.most_bytes = size, inputs, calls, most_bytes
        self.waiting: list[tuple[int, nn.Module, Quick, Tensor, int, Tensor, int]] = []
        self._noted: list[Noted] = []
        self._makers: dict[int, Node | None] = {}  # what makes a group's input again
        self._casts = 0
        self._odd: set[nn.Module] = set()
        self._met: list[_Met] = []
        self.bytes = 0
        self.open = True

    def settle(self) -> set[nn.Module]:
        """Look at the calls so far. → modules whose calls cannot be noted: a pass that called any is void."""
        large = self.bytes > self.most_bytes
        last, last_version, group = None, 0, 0
        for turn, module, quick, a, version, output, output_version in self.waiting:
            if a is not last or version != last_version:
                last, last_version, group = a, version, self._inputs.group(a, version, turn)
            self.calls[turn] = module, group
            parameters: Any = module._parameters
            # a hook on a kept output would change its gradient after it is read
            if output._version != output_version or parameters.changed or (not large and output._backward_hooks):
                self._odd.add(module)
                continue
            made: Tensor | None = output
            maker, node, number, shape = None, None, 0, None
            if large:
                made, shape = _product_of(output)
                if made is None or made.grad_fn is None:
                    self._odd.add(module)
                    continue
                node, number = made.grad_fn, made.output_nr
                maker = self._maker(a, group) if quick.reads and quick.remade else None
            kept = a if quick.reads and maker is None else None
            place = None if large else output
            self._noted.append(_new(Noted, (turn, module, group, kept, version, maker, place, node, number, shape)))
        self.waiting.clear()
        return self._odd

    def _maker(self, a: Tensor, group: int) -> Node | None:
        if group not in self._makers:
            maker = maker_of(a)
            if maker is not None and is_cast(maker):
                self._casts += 1
                maker = None if self._casts % ONE_IN else maker
            self._makers[group] = maker
        return self._makers[group]

    def ask(self, total: Tensor, anchor: Tensor, note: Note, again: bool) -> set[nn.Module]:
        """Send the gradient of `total` down the tape to `anchor`; `note` meets that of each noted call on the way.

        With `again` the tape and what was noted are left for another backward. → the modules of which no gradient came.
        """
        self.open = False
        if self.bytes > self.most_bytes:
            self._meet(note, again)
            torch.autograd.grad(total, anchor, allow_unused=True, retain_graph=again)
            return {met.module for met in self._met if not met.came}
        outputs: list[Any] = [call.output for call in self._noted]
        found = torch.autograd.grad(total, [anchor, *outputs], allow_unused=True, retain_graph=again)
        missing: set[nn.Module] = set()
        for call, d in zip(reversed(self._noted), reversed(found[1:]), strict=True):
            if d is None:
                missing.add(call.module)
            else:
                note(call.turn, call.module, call.group, call.a_as_read(), d)
        if not again:
            self._noted.clear()
        return missing

    def _meet(self, note: Note, again: bool) -> None:
        """Have every gradient met where it arrives."""
        if not self._met:
            self._met = [_Met(call, self._inputs, note) for call in self._noted]
        for met in self._met:
            met.again = again
        self._noted.clear()

    def close(self) -> None:
        """Let go of what the pass made."""
        self.waiting.clear()
        self._noted.clear()
        self._makers, self._met = {}, []


def stand_in(module: nn.Module, quick: Quick, current: Current) -> Callable[..., Any]:
    """What stands for the forward of a module that was seen to be plain, while a pass is current.

    Asked at every tap of every pass: what is looked up once too often shows.
    """
    own = module.__dict__
    forward, sparing, asked = _forwards_of(module)

    def noting(*args: Any, **kwargs: Any) -> Any:
        noted = current.arrivals
        if sparing is not None and noted.bytes > noted.most_bytes and not kwargs and _is_plain(args):
            output = sparing(*args)
        else:
            output = forward(*args, **kwargs)
        own["_parameters"].count += asked
        if kwargs or len(args) != 1 or type(output) is not Tensor or not output.requires_grad or not noted.open:
            return current.otherwise(module, args, kwargs, output)
        if noted.size > 1 and (output.ndim < 2 or output.shape[0] != noted.size):
            return current.otherwise(module, args, kwargs, output)
        if _are_transformed() or not are_saved_plainly():
            return current.otherwise(module, args, kwargs, output)
        a, calls = args[0], noted.calls
        noted.waiting.append((len(calls), module, quick, a, a._version, output, output._version))
        calls.append((module, -1))
        noted.bytes += output.nbytes + a.nbytes
        if noted.bytes > noted.most_bytes:
            noted.settle()
        return output

    return noting


def _forwards_of(module: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any] | None, int]:
    """A module's forward, one whose way back takes the rows that a gradient reached, and how often the module would
    have asked for a parameter that is given beforehand."""
    own: Any = module._parameters
    weight: Tensor | None = own.get("weight")
    if type(module) is not nn.Linear or "forward" in module.__dict__ or weight is None or "bias" not in own:
        return module.forward, None, 0
    given: Any = {"weight": weight, "bias": own.get("bias")}
    sparing = None if weight.is_cuda or type(weight) is not nn.Parameter else partial(linear, **given)
    return partial(F.linear, **given), sparing, 2


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether a linear layer's call is one on the pass's own tape alone, by nobody's transform, mode or cast."""
    if len(args) != 1 or type(args[0]) is not Tensor or not args[0].requires_grad or not torch.is_grad_enabled():
        return False
    if _are_transformed() or not are_saved_plainly() or torch.is_autocast_enabled(args[0].device.type):
        return False
    return args[0].ndim > 1 and forward_ad._current_level < 0


def _product_of(output: Tensor) -> tuple[Tensor | None, torch.Size | None]:
    """What stays on the way of a layer's gradient if somebody goes on in place, and the output's shape if it differs.

    A view's node is then taken off the way, its base's is not; None where that is not all of it.
    """
    if not output._is_view():
        return output, None
    base = output._base
    whole = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return (base if whole else None), output.shape


class _Met:
    """What meets the gradients of a tape's node, before the node does."""

    def __init__(self, call: Noted, inputs: Inputs, note: Note) -> None:
        self.module, self.came, self.again = call.module, False, False
        self._call: Noted | None = call
        self._inputs, self._note = inputs, note
        assert call.node is not None  # of a pass where outputs are not kept
        call.node.register_prehook(self)

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        call = self._call
        assert call is not None
        d = gradients[call.number]
        if d is None:
            return
        self.came = True
        a = call.a_as_read() if call.maker is None else self._inputs.remade(call.maker, call.group)
        self._note(call.turn, call.module, call.group, a, call.shaped(d))
        if not self.again:
            self._call = None  # and the input with it
