"""What a call launches, where it waits for the device, and what it copies from pageable memory.

    with Counted(model, candidates, references) as counts:
        engine.steering(candidates, references)
    counts.launches, counts.synchronisations, counts.pageable_copies

On CUDA torch's profiler and its debug mode for synchronisations tell. Without a GPU the CPU stands for the device:
the storages of what `Counted` is given, and of whatever is computed from them or made with `device=` that device, lie
"on the device", all others on the host. An operation that would wait for the device, or copy between the two, is
counted by what it is. Not seen there: data read behind torch's back, as `untyped_storage().data_ptr()` reads it.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These read a value back, or a count of results that the host has to know.
WAITING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
}
READING = {"cpu", "tolist", "numpy", "__array__"}  # methods of a tensor that bring it to the host
LIBRARY = Path(torch.__file__).parent


class Event(NamedTuple):
    """What happened, and the line that made it: the innermost one outside torch (and its modes)."""

    what: str
    where: str


@dataclass
class Counts:
    """Attributes:
    launches: of our own kernels, by name. kernels: of all, on CUDA; None elsewhere.
    synchronisations, pageable_copies, pinned_copies: events in their order.
    """

    launches: list[str] = field(default_factory=list)
    kernels: int | None = None
    kernel_ms: dict[str, float] = field(default_factory=dict)
    synchronisations: list[Event] = field(default_factory=list)
    pageable_copies: list[Event] = field(default_factory=list)
    pinned_copies: list[Event] = field(default_factory=list)


class Counted:
    """Counts while it is entered; `on_device` are models, batches and tensors that lie on the device."""

    def __init__(self, *on_device: nn.Module | Mapping[str, Any] | Tensor) -> None:
        self._tensors = list(_tensors(on_device))
        self._device = self._tensors[0].device if self._tensors else torch.device("cpu")
        self._stack = ExitStack()

    def __enter__(self) -> Counts:
        counts = Counts()
        if self._device.type == "cuda":
            self._stack.enter_context(_profiled(counts))
            return counts
        marks = _Marks(self._device, counts)
        for tensor in self._tensors:
            marks.put(tensor)
        self._stack.enter_context(_launches(counts, marks))
        self._stack.enter_context(_Functions(marks))
        self._stack.enter_context(_Operations(marks))
        return counts

    def __exit__(self, *problem: Any) -> None:
        self._stack.close()


def _tensors(given: Sequence[nn.Module | Mapping[str, Any] | Tensor]) -> Iterator[Tensor]:
    for one in given:
        if isinstance(one, nn.Module):
            yield from (*one.parameters(), *one.buffers())
        elif isinstance(one, Tensor):
            yield one
        else:
            yield from (value for value in one.values() if isinstance(value, Tensor))


class _Marks:
    """Which storages stand for memory on the device, and which for pinned memory on the host."""

    def __init__(self, device: torch.device, counts: Counts) -> None:
        self.device, self.counts = device, counts
        self.idle = False
        # the weak reference keeps the address from being given to another storage
        self._kept: dict[int, tuple[StorageWeakRef, str]] = {}

    def put(self, tensor: Tensor, where: str = "device") -> None:
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = StorageWeakRef(storage), where

    def where(self, tensor: Tensor) -> str:
        return self._kept.get(tensor.untyped_storage()._cdata, (None, "host"))[1]

    def on_device(self, value: object) -> bool:
        return isinstance(value, Tensor) and self.where(value) == "device"

    def wait(self, what: str) -> None:
        self.counts.synchronisations.append(Event(what, _line()))

    def copy_up(self, source: Tensor, what: str) -> None:
        kind = self.counts.pinned_copies if self.where(source) == "pinned" else self.counts.pageable_copies
        kind.append(Event(what, _line()))


class _Operations(TorchDispatchMode):
    """Operations by what they are: those that wait, copies between device and host, and where results lie."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self._marks = marks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        marks = self._marks
        if marks.idle:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        above = any(map(marks.on_device, given))
        if name == "copy_":
            self._copy(args[0], args[1])
        elif above:
            self._look(func, name, args, kwargs)
        if func._schema.name.startswith("fpo_native::"):
            marks.counts.launches.append(name)
        result = func(*args, **kwargs)
        if above and name != "copy_":
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    marks.put(made)
        return result

    def _look(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        marks = self._marks
        counted = name == "repeat_interleave" and kwargs.get("output_size") is None
        checked = name == "segment_reduce" and not kwargs.get("unsafe", False)
        if name in WAITING or (counted and func._overloadname != "self_int") or checked:
            marks.wait(f"aten::{name}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:
                if index is None:
                    continue
                if index.dtype in (torch.bool, torch.uint8):
                    marks.wait(f"aten::{name} by a mask")
                if marks.on_device(args[0]) and not marks.on_device(index):
                    marks.copy_up(index, f"aten::{name} by an index on the host")

    def _copy(self, target: Tensor, source: Tensor) -> None:
        marks = self._marks
        if marks.on_device(target) and not marks.on_device(source) and source.ndim:
            marks.copy_up(source, "aten::copy_")
        elif marks.on_device(source) and not marks.on_device(target) and marks.where(target) != "pinned":
            marks.wait("aten::copy_ to the host")


class _Functions(TorchFunctionMode):
    """Calls that, where host and device are one, reach no operation: moves, and what is made with `device=`."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self._marks = marks

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        marks = self._marks
        name = getattr(func, "__name__", "")
        if marks.idle:
            return func(*args, **kwargs)
        first = args[0] if args else None
        if name in READING and marks.on_device(first):
            marks.wait(f"Tensor.{name}")
            with _paused(marks):
                return first.clone() if name == "cpu" else func(*args, **kwargs)  # type: ignore[union-attr]
        if name == "pin_memory" and isinstance(first, Tensor):
            with _paused(marks):
                pinned = first.clone()
            marks.put(pinned, "pinned")
            return pinned
        if name == "to" and isinstance(first, Tensor) and self._moves(args[1:], kwargs):
            if not marks.on_device(first):
                return self._up(func, first, args, kwargs)
        elif isinstance(kwargs.get("device"), (str, torch.device)) and self._here(kwargs["device"]):
            if name in ("tensor", "as_tensor", "asarray"):
                marks.counts.pageable_copies.append(Event(f"torch.{name}", _line()))
            made = func(*args, **kwargs)
            for one in tree_leaves(made):
                if isinstance(one, Tensor):
                    marks.put(one)
            return made
        pinned = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        if pinned and isinstance(made, Tensor):
            marks.put(made, "pinned")
        return made

    def _up(self, func: Any, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A copy from the host to the device, of which nothing is left to do where both are one."""
        self._marks.copy_up(source, "Tensor.to")
        with _paused(self._marks):
            moved: Tensor = func(*args, **kwargs)
            moved = moved.clone()
        self._marks.put(moved)
        return moved

    def _moves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        wanted = kwargs.get("device", args[0] if args else None)
        if isinstance(wanted, Tensor):
            return self._marks.on_device(wanted)
        return isinstance(wanted, (str, torch.device)) and self._here(wanted)

    def _here(self, device: str | torch.device) -> bool:
        return torch.device(device).type == self._marks.device.type


@contextmanager
def _paused(marks: _Marks) -> Iterator[None]:
    before, marks.idle = marks.idle, True
    try:
        yield
    finally:
        marks.idle = before


@contextmanager
def _launches(counts: Counts, marks: _Marks) -> Iterator[None]:
    """Triton's launches by name, interpreted ones too; what the interpreter does within is no work of ours."""
    with ExitStack() as stack:
        for launcher in _launchers():
            plain = launcher.run

            def run(self: Any, *args: Any, plain: Callable[..., Any] = plain, **kwargs: Any) -> Any:
                if marks.idle:
                    return plain(self, *args, **kwargs)
                counts.launches.append(getattr(getattr(self, "fn", None), "__name__", "kernel"))
                with _paused(marks):
                    return plain(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(launcher, "run", run))
        yield


def _launchers() -> list[Any]:
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        return []
    return [JITFunction, InterpretedFunction]


@contextmanager
def _profiled(counts: Counts) -> Iterator[None]:
    """On CUDA: kernels and copies from the profiler; synchronisations from torch's warnings, by line."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    def warned(message: Any, *rest: Any, **more: Any) -> None:
        if "synchroniz" in str(message):
            counts.synchronisations.append(Event(str(message).splitlines()[0][:120], _line()))

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with _launches(counts, _Marks(torch.device("cuda"), counts)), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = warned
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
                torch.cuda.synchronize()
    counts.kernels = 0
    for event in profiler.events() or ():
        if event.device_type != DeviceType.CUDA:
            continue
        name = event.name
        if name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
            pageable = "Pageable" in name
            copies = counts.pageable_copies if pageable else counts.pinned_copies
            if name.startswith("Memcpy HtoD"):
                copies.append(Event(name, "profiler"))
        elif not name.startswith(("Memcpy", "Memset")):
            counts.kernels += 1
            counts.kernel_ms[name] = counts.kernel_ms.get(name, 0.0) + event.time_range.elapsed_us() / 1e3


def _line() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        # a torch function mode is on the way of every call and makes none of them
        if LIBRARY not in path.parents and path != Path(__file__) and frame.name != "__torch_function__":
            return f"{'/'.join(path.parts[-3:])}:{frame.lineno} {frame.name}: {frame.line}"
    return "?"
