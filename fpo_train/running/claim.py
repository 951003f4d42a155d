"""One writer at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fpo_train.errors import RunError

try:
    import fcntl
except ImportError:  # pragma: no cover (systems without POSIX locks)
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """No other process that claims a folder writes into it meanwhile; the claim ends with the process, however it ends.

    Of several ranks the first claims for all. A folder that is not there is made, and removed again if nothing was put
    into it. Where a file system or a system cannot lock folders, nothing is claimed.

    Raises:
        RunError: another process has it.
    """
    if fcntl is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    made = not out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"out: another process writes into {out}; choose another folder, or wait for it") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                out.rmdir()
