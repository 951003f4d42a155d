"""One process or several: the device, sums and gathers over processes, and the trackers, all through accelerate.

Every process ("rank") holds whole copies of the models and works on its own prompts. What an iteration needs of all
prompts goes through `Processes`; with one process each of these calls gives back what it was given.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fpo_train.config import RunConfig
from fpo_train.errors import RunError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

BUCKET = 2**24  # numbers a collective of sum_gradients: 64 MiB in fp32, so that its copy stays small beside a model
PATIENCE = timedelta(hours=2)  # a rank may wait for another's judge, with its retries, or for a checkpoint
TRACKING, RUN_ID = "tracking", "id"


class Ranks:
    """The processes that torch.distributed knows of when they are asked for; alone where it has not been set up.

    Calls that concern other ranks must be made by every rank, in the same order. Results are the same on all ranks,
    bit for bit, and detached from any graph.
    """

    @property
    def rank(self) -> int:
        """This process's number."""
        return torch.distributed.get_rank() if _joined() else 0

    @property
    def world(self) -> int:
        """How many there are."""
        return torch.distributed.get_world_size() if _joined() else 1

    @property
    def main(self) -> bool:
        """Whether this is the first."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where tensors must be that travel between them."""
        over_gpus = _joined() and torch.distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if over_gpus else torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors joined along dimension 0, in rank order.

        Args:
            tensor: (n, …) of any dtype on any device; n may differ between ranks and may be 0, the rest may not.

        Returns:
            (Σn, …) of the same dtype on the same device. Bits are carried over as they are, those of a NaN too.

        Raises:
            ValueError: a scalar, or rows that take different numbers of bytes on different ranks.
        """
        if tensor.dim() == 0:
            raise ValueError("gather: wanted a tensor of one dimension or more, got a scalar")
        if self.world == 1:
            return tensor.detach()
        width = math.prod(tensor.shape[1:]) * tensor.element_size()
        sizes = self._join(torch.tensor([len(tensor), width], device=self.device)).tolist()
        if len({size for _, size in sizes}) > 1:
            raise ValueError(f"gather: rows take {[size for _, size in sizes]} bytes on the ranks; wanted one size")
        longest = max(length for length, _ in sizes)
        if longest * width == 0:
            return tensor.new_empty(sum(length for length, _ in sizes), *tensor.shape[1:])
        # As bytes: nothing is added up here, and gloo and NCCL each lack some dtype.
        padded = torch.zeros(longest * width, dtype=torch.uint8, device=self.device)
        padded[: len(tensor) * width] = tensor.detach().contiguous().view(-1).view(torch.uint8)
        whole = [part[: length * width] for part, (length, _) in zip(self._join(padded), sizes, strict=True)]
        return torch.cat(whole).to(tensor.device).view(tensor.dtype).view(-1, *tensor.shape[1:])

    def gather_objects(self, items: list[T]) -> list[T]:
        """All ranks' lists joined in rank order; the items are pickled, so tensors in them should be on the CPU."""
        if self.world == 1:
            return list(items)
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def total(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over ranks, in rank order; same shape, dtype and device as `tensor`.

        Raises:
            ValueError: truth values, whose sum is no truth value.
        """
        if tensor.dtype == torch.bool:
            raise ValueError("total: wanted numbers, got truth values")
        if self.world == 1:
            return tensor.detach()
        return self.gather(tensor[None]).sum(0, dtype=tensor.dtype)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Set every `grad` to its sum over ranks, in place.

        A rank without a gradient counts as zeros. Where no rank has one, none appears, so that an optimizer leaves
        the parameter alone as it would in one process. Half precision is summed in fp32 and rounded once. Gradients
        travel together, at most `BUCKET` numbers at a time; the copy takes that much memory, or the largest
        parameter's.

        Args:
            parameters: the same ones in the same order on all ranks.
        """
        if self.world == 1:
            return
        own = list(parameters)
        found = self._join(torch.tensor([p.grad is not None for p in own], dtype=torch.uint8, device=self.device))
        for bucket in _buckets(p for p, ranks in zip(own, found.any(0).tolist(), strict=True) if ranks):
            wide = torch.float32 if bucket[0].element_size() < 4 else bucket[0].dtype
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(wide) for p in bucket])
            torch.distributed.all_reduce(
                flat
            )  # each number is summed in one place and sent on: the same bits everywhere
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                if p.grad is None:
                    p.grad = torch.empty_like(p)
                p.grad.copy_(part.view_as(p))

    def broadcast_flag(self, flag: bool) -> bool:
        """True on all ranks if any rank says True."""
        return bool(self._join(torch.tensor([flag], dtype=torch.uint8, device=self.device)).any())

    def _join(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape (n,) and dtype on `device` → (world, n)."""
        if self.world == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        torch.distributed.all_gather(parts, tensor)
        return torch.stack(parts)


class Processes(Ranks):
    """The processes of a run, as `accelerate launch` or `torchrun` started them; alone without a launcher.

    On CPUs start them by `torchrun --nproc_per_node 2 …`: `accelerate launch --cpu --num_processes 2` begins a single
    process unless it is given MPI hosts, which then does all the work itself, with the same results.

    The device is this rank's GPU, or the CPU where there is none or accelerate was told to use it. Processes talk
    through NCCL on GPUs, through gloo on CPUs. Precision is the policy's own setting: accelerate's `mixed_precision`
    changes nothing, because no model is handed to it.

    Raises:
        RunError: a launcher set up for sharded models (FSDP, DeepSpeed, …).
    """

    def __init__(self) -> None:
        from accelerate import Accelerator  # here, so that importing this module costs nothing
        from accelerate.utils import InitProcessGroupKwargs

        # Without `cpu` accelerate would not join the processes of torchrun where there are no GPUs.
        self._cpu = not torch.cuda.is_available()
        accelerator = Accelerator(cpu=self._cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
        kind = accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise RunError(f"accelerate is set up for {kind}; wanted plain processes with a whole model in each")
        self._accelerator = accelerator
        self._tracking: Accelerator | None = None

    @property
    def rank(self) -> int:
        """This process's number, also when they have parted."""
        return self._accelerator.process_index

    @property
    def world(self) -> int:
        """How many they are, or were."""
        return self._accelerator.num_processes

    @property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU."""
        return self._accelerator.device

    def share(self, items: list[T]) -> list[T]:
        """This rank's slice of a list that all ranks have: items[rank · n/world : (rank + 1) · n/world].

        Raises:
            RunError: a length that the number of processes does not divide.
        """
        if len(items) % self.world:
            raise RunError(f"{self.world} processes cannot share {len(items)} prompts evenly; change rollout.prompts")
        each = len(items) // self.world
        return items[self.rank * each : (self.rank + 1) * each]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self._accelerator.wait_for_everyone()

    def start_tracking(self, config: RunConfig, done: int = 0) -> None:
        """Open the tracker of `config.logging`, if any, for the run in `config.out`, of which `done` iterations are.

        A run gone on with stays one run there: its id is kept in `<out>/tracking`, and what had been logged after
        iteration `done` is replaced (TensorBoard) or stands, being the same (wandb). Only the main rank tracks.

        Raises:
            RunError: a tracker whose package is missing, or which cannot start.
        """
        self.stop_tracking()
        tracker = config.logging.tracker
        if tracker == "none" or not self.main:
            return
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers

        if tracker not in [kind.value for kind in get_available_trackers()]:
            raise RunError(f"logging.tracker: {tracker} needs the package {tracker}; install it, or choose none")
        folder = Path(config.out) / TRACKING
        fresh = not (folder / RUN_ID).is_file()
        options = _tracker_options(tracker, folder, done)
        try:
            self._tracking = Accelerator(cpu=self._cpu, log_with=tracker, project_dir=folder)
            settings = dict(flatten(asdict(config), ".")) if fresh else None
            self._tracking.init_trackers(config.logging.project, settings, {tracker: options})
        except Exception as error:  # of packages of their own, each with errors of its own: no key, no network, …
            raise RunError(f"logging.tracker: {tracker} does not start: {error}") from error

    def track(self, row: dict[str, Any], step: int) -> None:
        """Log an iteration's numbers and texts; nested ones as `seconds/score`, what is null not at all."""
        if self._tracking is not None:
            self._tracking.log({key: value for key, value in flatten(row, "/") if value is not None}, step=step)

    def stop_tracking(self) -> None:
        """Close the tracker, if one is open."""
        if self._tracking is not None:
            for tracker in self._tracking.trackers:
                tracker.finish()
        self._tracking = None

    def finish(self) -> None:
        """Close the tracker and leave the group of processes; the last call of a command."""
        self.stop_tracking()
        self._accelerator.end_training()


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Runs of parameters of one dtype and device, of at most BUCKET numbers unless one alone has more."""
    bucket: list[torch.nn.Parameter] = []
    for p in parameters:
        alike = not bucket or (p.dtype, p.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or sum(q.numel() for q in bucket) + p.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def flatten(tree: dict[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings as (joined keys, value); what is no bool, number, text or None becomes text."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            plain = value is None or isinstance(value, (bool, int, float, str))
            yield prefix + key, value if plain else str(value)


def _tracker_options(tracker: str, folder: Path, done: int) -> dict[str, Any]:
    """What each tracker needs to take a resumed run for the one it knows (the id is drawn at the first start)."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / RUN_ID
    if not (known.is_file() and known.stat().st_size):  # not there, or cut off before it was written
        known.write_text(secrets.token_hex(4), encoding="ascii")
    name, run_id = folder.resolve().parent.name, known.read_text(encoding="ascii")
    if tracker == "tensorboard":
        return {"purge_step": done + 1}
    if tracker == "wandb":
        return {"id": run_id, "name": name, "dir": str(folder), "resume": "allow"}
    return {"name": f"{name}-{run_id}", "resume": "allow"}
