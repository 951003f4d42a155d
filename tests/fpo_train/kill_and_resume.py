"""`kill_and_resume.py folder kills seed longest -- words…`: run to the end, killed at random moments on the way.

Every attempt is a fork of this process, which has imported everything but computed nothing, so that starting again is
cheap. Until it has been killed often enough it lasts `longest` seconds at most. Prints how often it was killed, and in
how many different states of its folder.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import fpo_train.run  # noqa: F401 - imported before the forks
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


def wait(child, seconds):
    """The exit code, or None when it is still running after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


if __name__ == "__main__":
    folder, kills, seed, longest = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    words = [*sys.argv[6:], "--out", str(folder), "--resume", "true"]
    folder.mkdir()
    rng = random.Random(seed)
    begun, killed, states = time.monotonic(), 0, set()
    while True:
        child = attempt(words)
        code = wait(child, rng.uniform(0.0, longest) if killed < kills else 600.0)
        if code is not None:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        states.add(state(folder))
    print(f"code {code}, killed {killed} times in {len(states)} states, {time.monotonic() - begun:.1f} s")
    sys.exit(code)
