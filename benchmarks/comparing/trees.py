"""What a revision is on disk: a folder as it is, or a temporary worktree of git with native libraries."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import ROOT

CASES = Path("benchmarks", "cases", "__init__.py")
NATIVE = ("csrc", "setup.py")  # what the native libraries are made of


class TreeError(Exception):
    """There is nothing of that name that can be compared; the message says what was given and what is wanted."""


@dataclass(frozen=True)
class Tree:
    """A checkout.

    Attributes:
        given: as on the command line. path: its root. commit: None for a folder.
        native: where its native libraries come from, in words.
    """

    given: str
    path: Path
    commit: str | None
    native: str


@contextlib.contextmanager
def tree(given: str, scratch: Path, repository: Path = ROOT) -> Iterator[Tree]:
    """A folder as it is, else a worktree of a revision, removed in the end.

    Args:
        given: a folder with a checkout, or a revision of the repository. scratch: an empty folder, or none yet, for the
            worktree. repository: whose revisions are meant, and whose native libraries are taken where they fit.

    Raises:
        TreeError: it is neither, or has no benchmark cases.
    """
    if Path(given, CASES).is_file():
        yield Tree(given, Path(given).resolve(), None, "the folder's own, as they are")
        return
    found = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{given}^{{commit}}")
    commit = found.stdout.strip()
    if found.returncode:
        raise TreeError(f"{given!r} is no revision of {repository}, and no folder with {CASES}; wanted one of the two")
    if _git(repository, "cat-file", "-e", f"{commit}:{CASES.as_posix()}").returncode:
        raise TreeError(f"{given!r} has no {CASES}; wanted a revision since there are benchmark cases")
    try:
        added = _git(repository, "worktree", "add", "--detach", "--quiet", str(scratch), commit)
        if added.returncode:
            raise TreeError(f"{given!r}: git made no worktree: {added.stderr.strip()}")
        yield Tree(given, scratch.resolve(), commit, bring_native(scratch, commit, repository))
    finally:
        _git(repository, "worktree", "remove", "--force", "--force", str(scratch))
        shutil.rmtree(scratch, ignore_errors=True)
        _git(repository, "worktree", "prune")


def bring_native(checkout: Path, commit: str, repository: Path) -> str:
    """Give a worktree the repository's native libraries where their sources are the same, else build them there.

    Returns:
        Which of the two, in words.
    """
    sources = [name for name in NATIVE if (checkout / name).exists()]
    if len(sources) < len(NATIVE):
        return f"none, as it has no {' and no '.join(name for name in NATIVE if name not in sources)}"
    differs = _git(repository, "diff", "--quiet", commit, "--", *NATIVE).returncode
    differs |= bool(_git(repository, "ls-files", "--others", "--exclude-standard", "--", *NATIVE).stdout)
    if not differs:
        libraries = sorted((repository / "fpo_kernels").glob("_native*"))
        for library in libraries:
            shutil.copy2(library, checkout / "fpo_kernels")
        return "the working tree's, which has the same sources" if libraries else "none, as the working tree has none"
    print(f"{commit[:10]}: its {' or '.join(NATIVE)} differs from the working tree's: building", flush=True)
    begun = time.monotonic()
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=checkout, capture_output=True, text=True
    )
    if built.returncode or not list((checkout / "fpo_kernels").glob("_native*.so")):
        return f"none, as they do not build: {(built.stderr.strip().splitlines() or ['nothing was said'])[-1]}"
    return f"built for it, in {time.monotonic() - begun:.0f} s"


def _git(repository: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # A session of its own: Ctrl-C at a terminal ends this program, and git still has to clear up after it.
    return subprocess.run(
        ["git", "-C", str(repository), *command], capture_output=True, text=True, start_new_session=True
    )
