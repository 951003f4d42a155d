"""Calls that are noted as they are made, and the gradients that the tape is asked for once it is whole.

Of a module that earlier passes saw to be plain, a pass needs no node on the tape and no hook: its output says where
its gradient will arrive. Where all of them take little room the tape is asked for them together, which costs a tenth
of a call of Python each; else each is met where it arrives, and let go of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .known import Quick
from .remake import Inputs, Node, are_saved_plainly, maker_of

_are_transformed = torch._C._are_functorch_transforms_active
_new: Any = tuple.__new__  # a named tuple's own takes twice as long
Note = Callable[[int, nn.Module, int, "Tensor | None", Tensor], None]


class Noted(NamedTuple):
    """A call: what it read, and where the gradient of its output arrives.

    Attributes:
        turn: among all calls. module: what was called. group: calls of one group read the same input.
        a: the input, at `version`; None where no rule reads it, or where `maker` makes it again.
        node: the tape's node, `number` which of its gradients. shape: the output's, where the node's is another.
    """

    turn: int
    module: nn.Module
    group: int
    a: Tensor | None
    version: int
    maker: Node | None
    node: Node
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
        bytes: what keeping all of them takes, inputs and gradients, with those of other taps.
        open: calls are noted; not where taps stand idle, and not once the way back has begun.
    """

    def __init__(self, size: int, inputs: Inputs, calls: list[tuple[nn.Module, int]], most_bytes: int) -> None:
        """`size` is the batch's; `calls` takes (module, group) of each; beyond `most_bytes` nothing is kept at once."""
        self._size, self._inputs, self._calls, self._most_bytes = size, inputs, calls, most_bytes
        self._noted: list[Noted] = []
        self._makers: dict[int, Node | None] = {}  # what makes a group's input again
        self._last: tuple[Tensor | None, int, int] = None, 0, 0  # the input met last, its version and group
        self.bytes = 0
        self._met: list[_Met] = []
        self.open = True

    def noting(self, module: nn.Module, quick: Quick, otherwise: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for the forward of a module that was seen to be plain; `otherwise` takes unusual calls on.

        Asked at every tap of every pass: what is looked up once too often shows.
        """
        forward, parameters = module.forward, module._parameters
        own, reads, remade_before = quick
        size, calls, noted = self._size, self._calls, self._noted

        def noting(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if kwargs or len(args) != 1 or type(output) is not Tensor or not output.requires_grad or not self.open:
                return otherwise(module, args, kwargs, output)
            if size > 1 and (output.ndim < 2 or output.shape[0] != size):
                return otherwise(module, args, kwargs, output)
            if _are_transformed() or not are_saved_plainly():
                return otherwise(module, args, kwargs, output)
            for attribute, parameter in own:
                if parameters.get(attribute) is not parameter:
                    return otherwise(module, args, kwargs, output)
            made, shape = output, None
            if output._is_view():  # going on in place would take the view's node off the way; its base's stays
                base = output._base
                if base is None or not _is_all_of(output, base):
                    return otherwise(module, args, kwargs, output)
                made, shape = base, output.shape
            node = made.grad_fn
            if node is None:
                return otherwise(module, args, kwargs, output)
            kept: Tensor = args[0]
            last, version, group = self._last
            if last is not kept or version != kept._version:
                group, version = self._inputs.group(kept, len(calls)), kept._version
                self._last = kept, version, group
            maker = None
            if reads and self.bytes > self._most_bytes:  # making a small one again would be work to save nothing
                maker = self._maker(kept, group)
                if maker is not None and not remade_before:
                    return otherwise(module, args, kwargs, output)
            self.bytes += output.nbytes + (kept.nbytes if reads else 0)
            a = kept if reads and maker is None else None
            noted.append(_new(Noted, (len(calls), module, group, a, version, maker, node, made.output_nr, shape)))
            calls.append((module, group))
            return output

        return noting

    def _maker(self, a: Tensor, group: int) -> Node | None:
        if group not in self._makers:
            self._makers[group] = maker_of(a)
        return self._makers[group]

    def ask(self, total: Tensor, anchor: Tensor, note: Note, again: bool) -> set[nn.Module]:
        """Send the gradient of `total` down the tape to `anchor`; `note` meets that of each noted call on the way.

        With `again` the tape and what was noted are left for another backward. → the modules of which no gradient came.
        """
        self.open, self._last = False, (None, 0, 0)
        together = self.bytes <= self._most_bytes
        inputs: list[Any] = [anchor]
        if together:
            inputs += [GradientEdge(call.node, call.number) for call in self._noted]
        else:
            self._meet(note, again)
        found = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=again)
        if not together:
            return {met.module for met in self._met if not met.came}
        missing: set[nn.Module] = set()
        for call, d in zip(reversed(self._noted), reversed(found[1:]), strict=True):
            if d is None:
                missing.add(call.module)
            else:
                note(call.turn, call.module, call.group, call.a_as_read(), call.shaped(d))
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
        self._noted.clear()
        self._makers, self._met, self._last = {}, [], (None, 0, 0)


def _is_all_of(view: Tensor, base: Tensor) -> bool:
    """Whether a view has its base's elements, in their order."""
    return base.numel() == view.numel() and base.is_contiguous() and view.is_contiguous()


class _Met:
    """What meets the gradients of a tape's node, before the node does."""

    def __init__(self, call: Noted, inputs: Inputs, note: Note) -> None:
        self.module, self.came, self.again = call.module, False, False
        self._call: Noted | None = call
        self._inputs, self._note = inputs, note
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
