"""Taps on a model for one pass, parameters frozen meanwhile; everything as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .arrivals import stand_in
from .capture import Shape, Taps
from .known import Current, Known, Plan, Stand
from .refusals import UnusableError
from .uses import Reads


def frozen(model: nn.Module, learning: Iterable[nn.Parameter] = ()) -> AbstractContextManager[None]:
    """No parameter requires grad but the given ones; they, and buffers, as before afterwards, whatever happens."""
    modules = list(model.modules())
    return _frozen([p for m in modules for p in m._parameters.values() if p is not None], modules, learning)


@contextmanager
def _frozen(
    parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module], learning: Iterable[nn.Parameter] = ()
) -> Iterator[None]:
    wanted = {id(parameter) for parameter in learning}
    with ExitStack() as stack:
        for parameter in parameters:
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
def tapped(plan: Plan, shape: Shape, known: Known, counting: bool, comparing: bool = False) -> Iterator[Taps]:
    """Taps on the sites' modules for one forward and `Taps.backward`; the model is restored whatever happens.

    Within another pass, of an output map that asks an engine of its own, the outer taps stand idle. In a pass that is
    `counting` every module has a full tap; in others those of a plain module's calls are noted.
    """
    taps = Taps(plan, shape, known, counting, comparing)
    with ExitStack() as stack:
        stack.enter_context(_frozen(plan.parameters, plan.modules))
        stack.callback(_untap, taps)
        quick = {} if counting else plan.quick
        stack.callback(_return_to, plan.current, plan.current.arrivals, plan.current.otherwise)
        taps.under(plan.current)
        for module in taps.names:
            own = module.__dict__
            taps.reads[module] = own["_parameters"] = Reads(own["_parameters"])
            if module in quick:
                taps.forwards[module] = before = own.get("forward")
                stand = plan.stands.get(module)
                usual = stand is not None and (before is stand.before or before is stand.forward)
                if stand is None or not usual or stand.quick != quick[module]:
                    stand = Stand(quick[module], before, stand_in(module, quick[module], plan.current))
                    plan.stands[module] = stand
                own["forward"] = stand.forward
                continue
            # first in line: a user's own hook may change the output, and d belongs to what the module made. What
            # register_forward_hook does, without handles, which cost as much as all the rest.
            hooks: Any = module._forward_hooks
            hooks[taps] = taps.hook
            hooks.move_to_end(taps, last=False)
            module._forward_hooks_with_kwargs[taps] = True  # type: ignore[index]
        for module in plan.quantised:
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


def _return_to(current: Current, arrivals: Any, otherwise: Any) -> None:
    """The pass within which this one was."""
    current.arrivals, current.otherwise = arrivals, otherwise


def _untap(taps: Taps) -> None:
    taps.close()
    for module, reads in taps.reads.items():
        own = module.__dict__
        if module not in taps.forwards:
            module._forward_hooks.pop(taps, None)  # type: ignore[call-overload]
            module._forward_hooks_with_kwargs.pop(taps, None)  # type: ignore[call-overload]
        elif taps.forwards[module] is None:
            del own["forward"]
        else:
            own["forward"] = taps.forwards[module]
        own["_parameters"] = reads.own
        if reads.changed:  # the forward put another parameter in its place
            reads.own.clear()
            reads.own.update(reads)


def _passes_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
    """Forward hook: bitsandbytes' 4-bit layers drop the gradient once they are packed for inference on a CPU."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if any(x.requires_grad for x in given) and not output.requires_grad:
        raise UnusableError(
            f"{type(module).__name__} passes no gradient on: its quantised weight was packed for inference, as "
            "bitsandbytes does on CPUs with AVX512-BF16 in eval mode; load the model again and call model.train() "
            "(without dropout) before the first forward"
        )
