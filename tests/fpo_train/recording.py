"""CUDA graphs, acted on a CPU: what a step does to tensors is recorded without being done, and done when replayed.

As on the device, a recorded operation reads and writes the very tensors that it was recorded with, and what waits for
the device, has a shape that numbers decide, or brings numbers from the host is refused.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh", "is_nonzero", "equal"}


class CUDAGraph:
    """In place of torch.cuda.CUDAGraph."""

    made = 0
    replays = 0

    def __init__(self):
        self._done = []
        type(self).made += 1

    def replay(self):
        type(self).replays += 1
        for function, args, kwargs, outputs in self._done:
            for out, new in zip(outputs, tensors(function(*args, **kwargs)), strict=True):
                if new.data_ptr() != out.data_ptr():
                    out.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, done):
        super().__init__()
        self._done, self._before = done, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in REFUSED or (name == "index" and any(one.dtype == torch.bool for one in args[1] if one is not None)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for one in tensors(value):
                    storage = one.untyped_storage()
                    self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = function(*args, **(kwargs or {}))
        self._done.append((function, args, kwargs or {}, tensors(out)))
        return out

    def undo(self):
        """Recording does nothing to the tensors."""
        for storage, numbers in self._before.values():
            storage.copy_(numbers)


@contextmanager
def graph(one):
    """In place of torch.cuda.graph."""
    recorder = Recorder(one._done)
    try:
        with recorder:
            yield
    finally:
        recorder.undo()


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def act(monkeypatch, decoding):
    """Let a CPU be what the host runs ahead of."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(decoding, "AHEAD", "cpu")
    CUDAGraph.made = CUDAGraph.replays = 0
