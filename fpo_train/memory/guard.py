"""Keeping a run under its memory budget: rows by the plan, halved when memory runs out; planned and measured peaks."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from fpo_train.config.units import show_bytes
from fpo_train.errors import RunError

from .plan import Plan

T = TypeVar("T")
FIRST_TRY = 64  # rows to halve from where there is no plan to say how many all rows are
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# what is no OutOfMemoryError because another than PyTorch's CUDA allocator was asked: its CPU one, the driver, cuBLAS
_MESSAGES = "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"


class Guard:
    """Runs the phases of a run: `guard("score", work)` calls work(rows_at_once) until it goes through.

    `work` must be able to begin anew after it was broken off, with fewer rows. On CUDA the allocator is capped to
    the plan's budget, so that a budget below the device's memory holds too. On a CPU the plan alone holds it.

    Args:
        plan: rows and bytes by phase; None takes all rows at once (rows_at_once = 0) until memory runs out.
        device: where the tensors are.

    Attributes:
        planned: bytes of each phase's peak by the plan.
        measured: bytes of each phase's peak so far: on CUDA of live tensors, on a CPU of the process's resident set,
            Python and the libraries included.
        rows: at once, by phase, as they are by now.
        told: called with the name of each phase as it begins.

    Raises:
        RunError: the budget cannot hold the plan.
    """

    def __init__(self, plan: Plan | None, device: torch.device) -> None:
        if plan is not None:
            plan.check()
        self._device, self._plan = device, plan
        self.rows = plan.rows if plan is not None else {}
        self._begun = dict(self.rows)
        self.planned = {name: phase.total for name, phase in plan.phases.items()} if plan is not None else {}
        self.measured: dict[str, int] = {}
        self.told: Callable[[str], None] = lambda phase: None
        self._meter = _Cuda(device) if device.type == "cuda" else _Process()
        if device.type == "cuda" and plan is not None and plan.budget is not None:
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, plan.budget / whole), device)

    def __call__(self, phase: str, work: Callable[[int], T]) -> T:
        """work(rows at once of the phase), again with half as many whenever memory runs out, for the rest of the run.

        Raises:
            RunError: memory runs out with one row.
        """
        self.told(phase)
        self._meter.reset()
        try:
            while True:
                rows = self.rows.get(phase, 0)
                try:
                    return work(rows)
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    said = str(error).strip().splitlines()[:1] or [type(error).__name__]
                    _let_go(error)
                # outside the handler, where nothing holds the broken call's tensors any more
                self._free()
                if rows == 1:
                    raise RunError(self._too_small(phase, said[0]))
                self.rows[phase] = rows // 2 if rows else FIRST_TRY
                print(
                    f"memory: {phase} ran out with {rows or 'all'} rows at once; on with {self.rows[phase]}",
                    file=sys.stderr,
                )
        finally:
            self.measured[phase] = max(self.measured.get(phase, 0), self._meter.peak())

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_small(self, phase: str, said: str) -> str:
        budget = None if self._plan is None else self._plan.budget
        told = "no budget" if self._plan is None or budget is None else f"{self._plan.bound} {show_bytes(budget)}"
        planned = f", where {show_bytes(self.planned[phase])} were planned" if phase in self.planned else ""
        return f"{phase}: memory ran out with one row at a time under {told}{planned} ({said})"

    def state_dict(self) -> dict[str, Any]:
        """Rows at once of each phase, at first and by now."""
        return {"begun": dict(self._begun), "rows": dict(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with rows that were halved, where the plan is what it was then."""
        for phase, rows in state["rows"].items():
            if state["begun"].get(phase) == self._begun.get(phase):
                self.rows[phase] = rows


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def _let_go(error: BaseException | None) -> None:
    """Clear the frames that an exception and its causes hold: their tensors live as long as they do."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class _Cuda:
    """Bytes of live tensors on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


class _Process:
    """The process's resident set, which holds Python, the libraries and what malloc keeps beside the tensors."""

    def reset(self) -> bool:
        """Begin anew; False where the system does not allow it, and the mark is that of the run so far."""
        try:
            _CLEAR.write_text("5")
        except OSError:
            return False
        return True

    def peak(self) -> int:
        try:
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        import resource  # not on every system; Linux has /proc

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
