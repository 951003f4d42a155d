"""A meter of the bytes that live tensors hold, for programs on the CPU, where torch counts none."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Bytes of the storages that are alive at a time, and the most there were since the meter was entered.

    Every operation's results are looked at as they come back from the kernel, in the backward pass too; a storage
    counts once, however many tensors lie in it, until nobody holds it. What a kernel takes and gives back within
    itself is not seen. Tensors made earlier count if they are given, and `beside` bytes that lie in no storage.
    """

    def __init__(self, held: Iterable[Tensor] = (), beside: int = 0) -> None:
        super().__init__()
        self.live = self.peak = beside
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None and known() is storage:
            return

        def gone(reference: weakref.ref[torch.UntypedStorage]) -> None:
            self.live -= size
            if self._storages.get(key) is reference:
                del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
