"""What a benchmark case is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Relative error allowed to what runs through a whole model, and to 16-bit gradients formed in between. fp32 has
# to agree as closely as closed form and autograd do; in bf16 plain autograd is 2% off float64 after 30 layers.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Told:
    """What another process says of one call that it made: the answer, its time there, and `peak_bytes` there."""

    answer: Tensor
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """One way to the answer.

    Attributes:
        run: computes it from inputs made beforehand; called many times. What it has another process do is Told.
        budget: the relative error ‖got − expected‖ / ‖expected‖ it may make.
        answers: which of the contest's expected tensors it returns.
        rounds: the most rounds it is timed in; None for every round, 0 to make do with the time of the call that
            the gate judges. For slow ones: a run has to end.
        figures: what else is measured of it, once, after the timing: name → number, kept in its row.
    """

    run: Callable[[], Tensor | Told]
    budget: float
    answers: str = "product"
    rounds: int | None = None
    figures: Callable[[], Mapping[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What an answer takes at the least, whoever computes it (benchmarks/floors.py).

    Attributes:
        bytes: inputs read once, answers written once. flops: of the cheapest exact way, a multiply-add being two.
        dtype: the name of what is multiplied: "float32", "bfloat16".
    """

    bytes: float
    flops: float
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Competitors over the same inputs.

    Attributes:
        competitors: name → competitor, in the order they take turns.
        expected: computes the right answers, name → tensor, in float64 or by a trusted way.
        cannot: name → why a competitor cannot run here.
        floors: answer, by the names of `expected` → what it takes at the least, where that can be said.
        once_above: a competitor whose gated call takes more than so many times the baseline's makes do with that call.
    """

    competitors: Mapping[str, Competitor]
    expected: Callable[[], Mapping[str, Tensor]]
    cannot: Mapping[str, str] = field(default_factory=dict)
    floors: Mapping[str, Floor] = field(default_factory=dict)
    once_above: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One ratio that a case is run for.

    Attributes:
        text: what is printed before it, with what is measured.
        over, under: the two competitors. figure: "seconds"; or "memory", the peak resident memory of their
            own processes, or where there are none (on a GPU) the peak beyond the start of the call; or the name
            of one of their `figures`.
    """

    text: str
    over: str
    under: str
    figure: str = "seconds"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A named comparison.

    Attributes:
        name: as on the command line. description: one line.
        competitors: the names that `build` gives, or gives a reason for not giving.
        baseline: the competitor whose time is 1 in the ratios.
        settings: (quick, device) → frozen dataclasses with a `name`, one contest each; written to the results.
        build: (setting, device) → its contest.
        headlines: the ratios printed below the table, for every setting.
        isolated: setting → the competitors whose memory is measured in processes of their own, on a CPU.
        summary: rows → what they come to in a few lines, printed under the table and kept.
        rounds: how often each is timed where the command line does not say.
        ours: the competitors that are our own, the best first; `compare` times the first that runs in both revisions.
        clock: what times it on a CPU: wall time, or `time.process_time`, of which others take nothing.
    """

    name: str
    description: str
    competitors: tuple[str, ...]
    baseline: str
    settings: Callable[[bool, torch.device], Sequence[Any]]
    build: Callable[[Any, torch.device], Contest]
    headlines: tuple[Headline, ...] = ()
    isolated: Callable[[Any], Sequence[str]] = lambda setting: ()
    summary: Callable[[list[dict[str, Any]]], str] | None = None
    rounds: int = 10
    ours: tuple[str, ...] = ()
    clock: Callable[[], float] = time.perf_counter


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What a device is measured in: fp32, and bf16 where models are kept in it."""
    return (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
