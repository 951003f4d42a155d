"""What an engine asks of a model before it runs it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .layers import is_hooked

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """One for all engines of a model: taps, and what requires grad, are the model's, whoever calls."""
    with _making:
        return _locks.setdefault(model, threading.RLock())


def check_mode(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Raises RuntimeError under inference mode, and where the model's mode lets chance or other examples in.

    Args:
        modules: all of the model's; to name them takes longer, and is asked for in every call.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Influence needs a backward pass and cannot run under torch.inference_mode; use no_grad")
    if not any(module.training for module in modules):
        return
    for name, module in model.named_modules():
        if module.training and _is_random(module):
            raise RuntimeError(
                f"{name} ({type(module).__name__}) drops activations at random or mixes examples in train "
                "mode: call model.eval() first"
            )


def _is_random(module: nn.Module) -> bool:
    """Whether a module in train mode drops activations or lets examples meet in batch statistics."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(
        isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)
        for name, value in vars(module).items()
    )


def refuse_wrapped(model: nn.Module) -> None:
    """Raises TypeError for a compiled or sharded model, ValueError for one whose weights are somewhere else."""
    for module in model.modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if "OptimizedModule" in kinds or getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"model: {type(module).__name__} is compiled and taps cannot see inside it; "
                "pass the module before torch.compile"
            )
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise TypeError(f"model: {type(module).__name__} is FSDP-sharded; pass an unsharded model")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"model: {name} has no shape yet (a lazy module); run the model once before")
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise TypeError(f"model: {name} is a sharded DTensor; pass an unsharded model")
        if hasattr(parameter, "ds_id") and not parameter.numel():
            raise TypeError(f"model: {name} is partitioned by DeepSpeed (ZeRO-3); gather the model first")
        if parameter.device.type == "meta":
            raise ValueError(
                f"model: {name} is on the meta device: its values are kept elsewhere between calls (accelerate's CPU "
                "or disk offload) or were never loaded; load the model onto one device"
            )


@contextmanager
def attending(left: bool) -> Iterator[None]:
    """Keeps attention from cuDNN where padding on the left makes queries that see no key.

    Its gradient of such a query is NaN, and that of the layers below with it (torch 2.11 in bfloat16 on an H200; the
    memory-efficient and the plain ones give zero).
    """
    backends = torch.backends.cuda
    others = backends.mem_efficient_sdp_enabled() or backends.math_sdp_enabled()
    if not (left and others and backends.cudnn_sdp_enabled()):
        yield
        return
    backends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        backends.enable_cudnn_sdp(True)


def parts_of(model: nn.Module) -> list[object]:
    """What a model consists of: its modules, their forwards, their parameters and whether a hook is on these.

    Asked in every call: `Module.modules()`, a generator within generators, would take longer than all else here.
    """
    found: list[object] = []
    met: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in met:
            continue
        met.add(module)
        own = module.__dict__
        forward = own.get("forward")  # kernel libraries replace it on the instance
        found += module, type(module).forward, getattr(forward, "stands_for", forward)
        for parameter in own["_parameters"].values():
            hooked = parameter is not None and parameter._backward_hooks and is_hooked(parameter)
            found += parameter, bool(hooked)
        waiting += [child for child in own["_modules"].values() if child is not None]
    return found


def pad_id_of(model: nn.Module) -> int | None:
    """The id that a model's config says it pads with; None where it says none."""
    return getattr(getattr(model, "config", None), "pad_token_id", None)
