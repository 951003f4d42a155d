"""Checkpoints of a model's trainable parameters on disk, and TracIn over them."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .batches import Batch
from .influence import Influence
from .models import lock_of
from .replay import replaying

_FORMAT = "fpo_kernels checkpoint 1"
_WHOLE = re.compile(r"(0|[1-9]\d*)\.safetensors")
_PARTIAL = re.compile(r"\.\d+-[0-9a-f]+\.partial")
_DTYPES = {"F64", "F32", "BF16", "F16"}  # as safetensors calls them


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """One saved state of the trainable parameters; its tensors stay on disk until they are asked for.

    Attributes:
        path: the file.
        step: the training step it was saved at.
        learning_rate: η, the rate the model was trained at there.
        shapes: parameter name → shape.
    """

    path: Path
    step: int
    learning_rate: float
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters it holds, by canonical name."""
        return tuple(self.shapes)

    def load(self) -> dict[str, Tensor]:
        """Parameter name → tensor, on the CPU, in the dtype it was saved in."""
        return dict(self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What `load` returns, one at a time."""
        with _opened(self.path) as file:
            for name in self.shapes:
                yield name, file.get_tensor(name)


class CheckpointStore:
    """A folder of checkpoints, one safetensors file each, that holds trainable parameters only.

    Step and learning rate are in the file's own metadata, so that a checkpoint is there whole or not at all: it is
    written beside, synced and renamed. What a killed save left behind is not read, and removed by the next save.
    One process may write at a time.

    Args:
        folder: a folder of its own; made by the first save.

    `len`, `.steps` and iteration see what is on disk now, in the order of steps.

    Raises:
        ValueError: the folder holds something else, or a file that is not one of this store's (when it is read).
        NotADirectoryError: `folder` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._paths()

    def __repr__(self) -> str:
        return f"CheckpointStore({str(self.folder)!r})"

    def __len__(self) -> int:
        return len(self._paths())

    def __iter__(self) -> Iterator[Checkpoint]:
        return (_read(path, step) for step, path in sorted(self._paths().items()))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are there, in order."""
        return tuple(sorted(self._paths()))

    def save(
        self, model: nn.Module, *, step: SupportsIndex, learning_rate: float, overwrite: bool = False
    ) -> Checkpoint:
        """Keep what requires grad in `model` now, a shared parameter once, in its own dtype.

        Args:
            model: not FSDP-sharded. DDP's own name is part of the parameters' names: pass `model.module`.
            step: ≥ 0. learning_rate: η ≥ 0, what TracIn weighs this state with.
            overwrite: whether a checkpoint of this step may be replaced (at once, never half).

        Raises:
            ValueError: nothing requires grad, a weight is not finite, a step or rate out of range.
            FileExistsError: the step is there already.
            TypeError: an FSDP-sharded model.
        """
        step = operator.index(step)
        learning_rate = float(learning_rate)
        if step < 0:
            raise ValueError(f"step={step}: wanted a number ≥ 0")
        if not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise ValueError(f"learning_rate={learning_rate}: wanted a finite number ≥ 0")
        if step in self._paths() and not overwrite:
            raise FileExistsError(f"step={step} is already in {self.folder}; pass overwrite=True to replace it")
        with lock_of(model):
            tensors = _trainable(model)
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _PARTIAL.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            metadata = {"format": "pt", "kind": _FORMAT, "step": str(step), "learning_rate": repr(learning_rate)}
            partial = self.folder / f".{step}-{secrets.token_hex(8)}.partial"
            whole = self.folder / f"{step}.safetensors"
            try:
                save_file(tensors, partial, metadata)
                _sync(partial)
                partial.replace(whole)
            finally:
                partial.unlink(missing_ok=True)
        if os.name == "posix":
            _sync(self.folder)
        return _read(whole, step)

    def _paths(self) -> dict[int, Path]:
        """Step → file."""
        if not self.folder.exists():
            return {}
        paths = {}
        for path in self.folder.iterdir():
            if name := _WHOLE.fullmatch(path.name):
                paths[int(name[1])] = path
            elif not path.name.startswith("."):
                raise ValueError(f"{self.folder}: wanted a folder of checkpoints alone, found {path.name!r} in it")
        return paths


def tracin(engine: Influence, store: Iterable[Checkpoint], batch: Batch, other: Batch | None = None) -> Tensor:
    """Σ_k η_k ⟨g_i, g_j⟩, gradients taken at every checkpoint k, of examples i of `batch` and j of `other`.

    The stored parameters are overwritten in place, one checkpoint after another; what is not stored stays as it is
    now, and afterwards the model is as it was, bit for bit, whatever happens. Beside the model this takes one copy
    of the stored parameters. Other engines of the model wait meanwhile; nothing else may run it.

    What no stored parameter can have moved is computed once: under a head the backbone runs once for all
    checkpoints, whatever head and `output` are. For this its outputs are kept, in at most as many bytes as the
    model's parameters take.

    Args:
        engine: whose parameters the gradients are of; it may cover others than are stored.
        store: a `CheckpointStore`, or some of its checkpoints. Where model and file differ in dtype, values are
            rounded to the model's.
        batch, other: B and M examples. Without `other`, both are `batch`.

    Returns:
        (B, M), fp32 or float64 as `gram`; summed over checkpoints in float64.

    Raises:
        ValueError: no checkpoint; a stored parameter that the model does not have in this shape, found before
            anything is changed; weights that are not finite in the model's dtype; as `gram`.

    Source: Pruthi et al. 2020, "Estimating training data influence by tracing gradient descent", section 3.
    """
    checkpoints = list(store)
    if not checkpoints:
        raise ValueError(f"store: wanted at least one checkpoint, got none in {store!r}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("tracin needs backward passes and cannot run under torch.inference_mode; use no_grad")
    model = engine.model
    with lock_of(model):
        stored = _stored(model, checkpoints)
        chosen = [model.get_parameter(row.parameter) for row in engine.coverage()]
        with _Swapped(stored) as swapped, replaying(model, stored.values(), chosen):

            def states() -> Iterator[float]:
                for checkpoint in checkpoints:
                    swapped.load(checkpoint)
                    yield checkpoint.learning_rate

            return engine.summed_gram(batch, other, states)


class _Swapped:
    """Parameters whose values are exchanged in place; when it is left they are as they were, bit for bit."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._own: dict[str, Tensor] = {}

    def __enter__(self) -> _Swapped:
        self._own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        return self

    def load(self, checkpoint: Checkpoint) -> None:
        """The checkpoint's values, and the model's own where it has none."""
        with torch.no_grad():
            for name in self._parameters.keys() - checkpoint.shapes.keys():
                self._parameters[name].copy_(self._own[name])
            for name, tensor in checkpoint.tensors():
                parameter = self._parameters[name].copy_(tensor)
                if not bool(parameter.isfinite().all()):
                    raise ValueError(f"{checkpoint.path}: {name!r} is not finite in {parameter.dtype}")
        torch.clear_autocast_cache()  # it knows weights by identity

    def __exit__(self, *_: object) -> None:
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                with torch.no_grad():
                    for name, own in self._own.items():
                        self._parameters[name].copy_(own)
                torch.clear_autocast_cache()
                break
            except KeyboardInterrupt as again:  # an impatient user's second one must not leave half a model
                interrupt = again
        if interrupt is not None:
            raise interrupt


def _stored(model: nn.Module, checkpoints: Iterable[Checkpoint]) -> dict[str, nn.Parameter]:
    """The model's parameters that any checkpoint holds, by name, checked to be able to take its values."""
    own = dict(model.named_parameters(remove_duplicate=False))
    stored: dict[str, nn.Parameter] = {}
    for checkpoint in checkpoints:
        for name, shape in checkpoint.shapes.items():
            where = f"{checkpoint.path}: {name!r}"
            if name not in own:
                raise ValueError(f"{where} is not a parameter of {type(model).__name__}")
            if tuple(own[name].shape) != shape or not own[name].is_floating_point():
                raise ValueError(
                    f"{where} is floating point {shape}, the model's is {own[name].dtype} {tuple(own[name].shape)}"
                )
            stored[name] = own[name]
    first: dict[int, str] = {}
    for name, parameter in stored.items():
        if first.setdefault(id(parameter), name) != name:
            raise ValueError(f"{name!r} and {first[id(parameter)]!r} are stored apart and one parameter in the model")
    return stored


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name → value of what requires grad, ready to be written."""
    if any("FullyShardedDataParallel" in {cls.__name__ for cls in type(m).__mro__} for m in model.modules()):
        raise TypeError(f"model: {type(model).__name__} is FSDP-sharded; save an unsharded model")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "full_tensor"):
            raise TypeError(f"{name}: sharded over devices; save an unsharded model")
        if not bool(parameter.detach().isfinite().all()):
            raise ValueError(f"{name}: not every weight is finite; TracIn over them would be NaN")
        value = parameter.detach().cpu().contiguous()
        # the file's library refuses tensors that share memory
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        tensors[name.replace("_orig_mod.", "")] = value  # torch.compile's wrapper
    if not tensors:
        raise ValueError(f"model: no parameter of {type(model).__name__} requires grad, so there is nothing to save")
    return tensors


def _read(path: Path, step: int) -> Checkpoint:
    """The checkpoint in a file, without its tensors."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("kind") != _FORMAT or metadata.get("step") != str(step):
            raise ValueError(f"{path}: wanted {_FORMAT!r} of step {step}, its metadata is {metadata}")
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        odd = next((name for name, piece in slices.items() if piece.get_dtype() not in _DTYPES), None)
        if odd is not None:
            raise ValueError(f"{path}: {odd!r} is {slices[odd].get_dtype()}; wanted floating point")
        return Checkpoint(
            path=path,
            step=step,
            learning_rate=float(metadata["learning_rate"]),
            shapes={name: tuple(piece.get_shape()) for name, piece in slices.items()},
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as problem:
        raise ValueError(f"{path}: damaged, or no safetensors file ({problem})") from problem


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
