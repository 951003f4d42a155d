"""`kill_and_resume.py folder kills seed most -- words…`: run to the end, killed at random moments on the way.

Every attempt is a fork of this process, which has imported everything but computed nothing, so that starting again is
cheap. Until it has been killed often enough it may add `most` rows to its metrics at most, and dies a random moment
later; some attempts die before they have added one. Prints how often it was killed, and in how many different states of
its folder.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import fpo_train.running.run  # noqa: F401 - imported before the forks
from fpo_train.cli import main

torch.set_num_threads(1)  # a fork does not inherit a pool of threads


def attempt(words):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = main(words)
        finally:
            os._exit(code)
    return child


def state(folder):
    """What a kill has left: names and sizes of the files."""
    return tuple(sorted((str(p), p.stat().st_size) for p in folder.rglob("*") if p.is_file()))


def rows(folder):
    """How many iterations the metrics hold."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait(child, enough):
    """The exit code, or None once `enough()` while it is still running."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if enough():
            return None
        time.sleep(0.002)
    return None


def moment(folder, rng, most):
    """A random moment: a number of rows from now, and some milliseconds more (an iteration takes about 50)."""
    goal, late = rows(folder) + rng.randint(0, most), rng.uniform(0, 0.1)
    reached = []

    def enough():
        if rows(folder) >= goal:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() >= reached[0] + late

    return enough


if __name__ == "__main__":
    folder, kills, seed, most = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    words = [*sys.argv[6:], "--out", str(folder), "--resume", "true"]
    folder.mkdir()
    rng = random.Random(seed)
    killed, states = 0, set()
    while True:
        child = attempt(words)
        code = wait(child, moment(folder, rng, most) if killed < kills else lambda: False)
        if code is not None:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        states.add(state(folder))
    print(f"code {code}, killed {killed} times in {len(states)} states")
    sys.exit(code)
