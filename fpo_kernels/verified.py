"""Kernels checked once at their first use: a launch configuration is believed after it has agreed with the reference.

A verdict holds for one device (name, compute capability) with one set of versions (torch, triton, CUDA, the kernels'
own source). It is kept in `${XDG_CACHE_HOME:-~/.cache}/fpo/kernels/`, so that the next process reads it; where that
folder cannot be read or written, the check is made again. What disagreed is refused by name, every time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Hashable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Key = tuple[Hashable, ...]

# What was found in this process: None where it agreed, else why it is refused.
_found: dict[tuple[Key, torch.device], str | None] = {}
_checking: set[tuple[Key, torch.device]] = set()
_lock = threading.RLock()


class Comparison(NamedTuple):
    """How far a result lay from the reference, where it was nearest to its budget or furthest beyond."""

    error: float  # |got − exact|
    allowed: float
    where: str  # which example or pair of the check's inputs

    @property
    def ratio(self) -> float:
        """error / allowed; above 1, or no number, it disagrees."""
        if self.allowed > 0:
            return self.error / self.allowed
        return 0.0 if self.error == 0 else float("inf")

    @property
    def agrees(self) -> bool:
        """Whether the result is believed."""
        return self.ratio <= 1  # false for NaN


def compared(got: Tensor, exact: Tensor, allowed: Tensor, what: str) -> Comparison:
    """got (n,) held to exact (n,) float64 within allowed (n,); `what` is what an entry is called, e.g. "pair"."""
    error = (got.detach().cpu().double() - exact).abs()
    ratio = torch.where(allowed > 0, error / allowed, torch.where(error == 0, 0.0, torch.inf))
    ratio = ratio.nan_to_num(torch.inf, torch.inf)  # a NaN is the worst there is
    worst = int(ratio.argmax())
    return Comparison(float(error[worst]), float(allowed[worst]), f"{what} {worst} of {len(exact)}")


def worst(comparisons: list[Comparison]) -> Comparison:
    """The one that lies furthest from the reference, measured by its budget."""
    return max(comparisons, key=lambda c: c.ratio if c.ratio == c.ratio else float("inf"))


def needed(device: torch.device) -> bool:
    """Whether kernels are checked at their first use: on GPUs. A CPU's are checked by the tests that built them."""
    return device.type == "cuda"


def ensure(key: Key, device: torch.device, check: Callable[[], Comparison]) -> None:
    """Check a launch configuration at its first use on `device`, and refuse it wherever it disagreed.

    Args:
        key: (operation, implementation, …): names and numbers that tell this configuration from others.
        device: where it is about to run, with its index.
        check: runs the configuration on a small input and compares; called at most once for a device and versions,
            without autograd and autocast. It may call what it checks through doors that ensure the same key.

    Raises:
        RuntimeError: the configuration disagreed with the reference, here or in an earlier process; or it has not been
            checked and a CUDA graph is being captured, where nothing can be.
    """
    known = key, device
    if known in _found and _found[known] is None:
        return
    if not needed(device):
        return
    with _lock:
        if known in _checking:  # the check itself comes by here
            return
        if known not in _found:
            _found[known] = _verdict(key, device, check)
        refusal = _found[known]
    if refusal is not None:
        raise RuntimeError(refusal)


def _verdict(key: Key, device: torch.device, check: Callable[[], Comparison]) -> str | None:
    """Read from the user's cache, or found and kept there; None if it agreed."""
    facts = circumstances(device)
    path = cache_file(facts)
    name = named(key)
    comparison = _read(path).get(name)
    if comparison is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name} has not been checked on this {facts['device']} yet, and while a CUDA graph is captured "
                "nothing can be: call it once with the same shapes before"
            )
        _checking.add((key, device))
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                comparison = check()
        finally:
            _checking.discard((key, device))
        _keep(path, facts, name, comparison)
    if comparison.agrees:
        return None
    return (
        f"{name} is wrong on this {facts['device']} with torch {facts['torch']} and triton {facts['triton']}: on a "
        f"small input it lies {comparison.error:.3g} from the float64 reference where rounding allows "
        f'{comparison.allowed:.3g} ({comparison.where}). It is not used; ask for impl="torch", and see '
        "`fpo-train doctor --kernels`"
    )


def named(key: Key) -> str:
    """A configuration as people read it, and as the cache keys it."""
    return " ".join(str(part).removeprefix("torch.") for part in key)


@functools.cache
def circumstances(device: torch.device) -> dict[str, str]:
    """What a verdict depends on besides the configuration."""
    facts = {"device": device.type, "capability": "", "driver": ""}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        driver = getattr(torch._C, "_cuda_getDriverVersion", None)
        facts["driver"] = "" if driver is None else str(driver())
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "absent"
    runtime = torch.version.cuda or torch.version.hip or ""
    return facts | {"torch": torch.__version__, "triton": triton, "runtime": runtime, "kernels": source_hash()}


@functools.cache
def source_hash() -> str:
    """Of the operations' Python and of the compiled libraries: a kernel that changed is another."""
    folder = Path(__file__).resolve().parent
    files = [*folder.glob("*/*.py"), *folder.glob("_native*.so"), Path(__file__).resolve(), folder / "budgets.py"]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def cache_file(facts: dict[str, str]) -> Path:
    """Where the verdicts of these circumstances are kept."""
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "fpo" / "kernels" / f"{name}.json"


def _read(path: Path) -> dict[str, Comparison]:
    """Verdicts by name; none where the file is absent, damaged or not ours to read."""
    try:
        verdicts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["verdicts"]
        return {name: Comparison(float(v[0]), float(v[1]), str(v[2])) for name, v in verdicts.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}


def _keep(path: Path, facts: dict[str, str], name: str, comparison: Comparison) -> None:
    """Add a verdict, whole or not at all. Of two processes at once one may win: the other's is found again."""
    verdicts = {key: list(value) for key, value in _read(path).items()} | {name: list(comparison)}
    text = json.dumps({"circumstances": facts, "verdicts": verdicts}, indent=1)
    with contextlib.suppress(OSError):  # the verdict then holds for this process alone
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
