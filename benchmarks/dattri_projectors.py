"""dattri's random projections of per-example gradients, in the process of the environment that has dattri.

python -m benchmarks.dattri_projectors <folder>

`work.pt` in the folder: {"layers": [(a, d, offsets), …], "dim": k, "seeds": {kind: how many}}, streams as
`gradients.Layer` has them. `answer.pt` comes beside it: {kind: {"vectors": (seeds, layers, examples, k), "seconds": of
the first seed}}.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.oporp import formed
from benchmarks.packages.processes import PEERS, ROOT

if TYPE_CHECKING:
    from benchmarks.gradients import Layer

MASK = "random_mask"
KINDS = ("normal", "rademacher", MASK)
NOT_HERE = dict.fromkeys(("sjlt", "grass"), "dattri has it on CUDA alone")
BATCH = 8  # of its kernels for CUDA; on a CPU it is asked for and not used


def elsewhere(layers: Sequence[Layer], dim: int, seeds: Mapping[str, int], folder: Path) -> dict[str, Any]:
    """All kinds' projections, by the interpreter of `make peers`; the answer as the module has it.

    Raises:
        RuntimeError: the process has ended without an answer.
    """
    streams = [(x.a.cpu(), x.d.cpu(), x.offsets.cpu()) for x in layers]
    torch.save({"layers": streams, "dim": dim, "seeds": dict(seeds)}, folder / "work.pt")
    command = [str(PEERS), "-m", "benchmarks.dattri_projectors", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    (folder / "work.pt").unlink()
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"its process has ended with {done.returncode}: {' '.join(last)}")
    found: dict[str, Any] = torch.load(folder / "answer.pt", weights_only=True)
    return found


def main(folder: Path) -> None:
    """Project what lies in the folder."""
    work: dict[str, Any] = torch.load(folder / "work.pt", weights_only=True)
    answers: dict[str, Any] = {}
    for kind, seeds in work["seeds"].items():
        vectors, took = [], []
        for seed in range(seeds):
            start = time.perf_counter()
            vectors.append(_projected(work["layers"], work["dim"], kind, seed))
            took.append(time.perf_counter() - start)
        answers[kind] = {"vectors": torch.stack(vectors), "seconds": took[0]}
    torch.save(answers, folder / "answer.pt")


def _projected(layers: Sequence[tuple[Tensor, Tensor, Tensor]], dim: int, kind: str, seed: int) -> Tensor:
    """(layers, examples, k); every layer and seed by a projector of its own.

    The random mask keeps k coordinates as they are: times √(D/k), which dattri leaves out, its inner products estimate
    those of the gradients. Block i of a dense matrix is drawn from the seed plus 1000·i: seeds here stay below 1000.
    """
    random_project = importlib.import_module("dattri.func.projection").random_project
    found = []
    for number, (a, d, offsets) in enumerate(layers):
        own = seed * len(layers) + number
        if own >= 1000:
            raise ValueError(f"{seed + 1} seeds of {len(layers)} layers: dattri's blocks would share their draws")
        g = formed(a, d, offsets)
        project = random_project(g, len(g), dim, BATCH, proj_seed=own, proj_type=kind, device="cpu")
        scale = (g.shape[1] / dim) ** 0.5 if kind == MASK else 1.0
        found.append(project(g) * scale)
    return torch.stack(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
