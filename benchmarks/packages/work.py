"""What is asked, and of which model on which texts: written to a file once, read by every package's process."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.models import Batch, block_weights, reward_model, rows, token_batch

Question = Literal["norms", "gram", "cross", "steering", "sketch"]
Run = Callable[[], Tensor]
OTHERS = 8  # a cross Gram matrix is to so many
SEED = 7
PIECE = 1 << 14  # numbers


def width_of_layers(task: Task) -> int:
    """Of projections of both sides of every layer: its square times the layers is what a text may have."""
    return math.isqrt(task.work.numbers // len(task.names))


def kept_of_layers(task: Task) -> int:
    """Numbers that such projections keep of a text."""
    return width_of_layers(task) ** 2 * len(task.names)


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T, of few rows of up to 10⁶ numbers: in one piece MKL's fp32 is 5e-5 off there."""
    pieces = zip(left.split(PIECE, 1), right.split(PIECE, 1), strict=True)
    return torch.stack([x @ y.T for x, y in pieces]).sum(0)


class Cannot(Exception):  # noqa: N818 (named for what is told)
    """A package has no way to a question, or none here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """All Linear weights of a Llama-type reward model of random weights, score head included; g_i = ∇r(z_i).

    Attributes:
        question: norms → ‖g_i‖² (N,); gram → ⟨g_i, g_j⟩ (N, N); cross → ⟨g_i, g_j⟩ (N, OTHERS) to other texts;
            steering → ⟨g_i, g_i − g_ref⟩ (N,), one more text being the reference; sketch → projections, whose inner
            products estimate the Gram matrix (N, N) that is returned.
        shape: of models.SHAPES. layers: its blocks. examples: N. tokens: of each text.
        full: all of `tokens`, else of unequal lengths from one to that, padded on the right.
        numbers: that a text's projection may have, all layers together; 0 where nothing is projected.
    """

    name: str
    question: Question
    shape: str
    layers: int
    examples: int
    tokens: int
    full: bool = True
    numbers: int = 0

    @property
    def texts(self) -> int:
        """How many the batch has, those that are compared with at its end."""
        return self.examples + {"cross": OTHERS, "steering": 1}.get(self.question, 0)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A work with its model, frozen, eval, fp32; names: of its Linear weights; batch: (texts, tokens)."""

    work: Work
    model: nn.Module
    names: Sequence[str]
    batch: Batch

    @property
    def own(self) -> Batch:
        """The N examples."""
        return rows(self.batch, slice(0, self.work.examples))

    @property
    def others(self) -> Batch:
        """What they are compared with: the others of a cross Gram matrix, or the reference."""
        return rows(self.batch, slice(self.work.examples, None))

    def answer(self, gram: Tensor) -> Tensor:
        """The question's answer from all texts' inner products (texts, texts)."""
        n = self.work.examples
        if self.work.question == "norms":
            return gram.diagonal()
        if self.work.question == "cross":
            return gram[:n, n:]
        if self.work.question == "steering":
            return gram.diagonal()[:n] - gram[:n, n]
        return gram

    def from_parts(self, norms: Tensor | None, cross: Tensor | None) -> Tensor:
        """The same from what its question needs: norms of the examples (N,), products with the others (N, M)."""
        if norms is None or cross is None:
            found = cross if norms is None else norms
            assert found is not None
            return found
        return norms - cross[:, 0]

    def formed(self, gradients: Sequence[Tensor]) -> Tensor:
        """The answer from all texts' gradients, a tensor (texts, …) a layer."""
        flat = [g.flatten(1) for g in gradients]
        n = self.work.examples
        if self.work.question == "norms":
            return torch.stack([(g * g).sum(1) for g in flat]).sum(0)
        if self.work.question == "cross":
            return torch.stack([multiplied(g[:n], g[n:]) for g in flat]).sum(0)
        if self.work.question == "steering":
            return torch.stack([(g[:n] * (g[:n] - g[n])).sum(1) for g in flat]).sum(0)
        return torch.stack([multiplied(g, g) for g in flat]).sum(0)


def made(work: Work, device: torch.device) -> Task:
    """Random weights and tokens."""
    model = reward_model(work.shape, work.layers, torch.float32, device, seed=SEED)
    batch = token_batch(work.texts, work.tokens, device, seed=SEED, full=work.full)
    return Task(work=work, model=model, names=block_weights(model), batch=batch)


def write(task: Task, folder: Path) -> None:
    """Into a folder, for `read`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "work.json").write_text(json.dumps(dataclasses.asdict(task.work)), encoding="utf-8")
    torch.save({"weights": task.model.state_dict(), "batch": task.batch}, folder / "inputs.pt")


def read(folder: Path, device: torch.device) -> Task:
    """What `write` wrote, the same numbers wherever they are read."""
    work = Work(**json.loads((folder / "work.json").read_text(encoding="utf-8")))
    held: dict[str, Any] = torch.load(folder / "inputs.pt", map_location=device, weights_only=True)
    model = reward_model(work.shape, work.layers, torch.float32, device, seed=SEED)
    model.load_state_dict(held["weights"])
    return Task(work=work, model=model, names=block_weights(model), batch=held["batch"])
