"""What an iteration is measured by, and the two JSONL files it goes to."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .oracle import Labels
from .penalty import Judged, overconfidence
from .policy import Policy
from .rollout import Rollout

Row = dict[str, Any]
Sample = dict[str, Any]
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 4)


def peak_memory(device: torch.device) -> int:
    """Bytes: the process's largest resident set, or on CUDA the most its tensors ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage would do, but a process begins with the resident set of the one that started it
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(
    iteration: int,
    judged: Judged,
    reference_reward: Tensor,
    labels: Labels,
    is_best: Tensor,
    rollout: Rollout,
) -> Row:
    """The figures of one iteration.

    reward, penalty and effective_reward are means over the candidates. What needs the oracle is taken over
    the (best, reference) pairs, whose labels every penalty buys: oracle_utility = mean U(best), nats a token;
    proxy_gap = mean [r(best) − r(ref)] − [U(best) − U(ref)]; overconfidence = mean c(best).
    """
    calls = labels.calls
    utility, reference_utility = labels.utilities(is_best)
    margin = (judged.reward - reference_reward)[is_best]
    gain = (utility - reference_utility)[is_best]
    n = rollout.candidates
    lengths = [len(reply) for row, reply in enumerate(rollout.replies) if row % (n + 1) < n]
    return {
        "iteration": iteration,
        "reward": judged.reward.mean().item(),
        "penalty": judged.penalty.mean().item(),
        "effective_reward": judged.effective.mean().item(),
        "chosen_reward": judged.reward[is_best].mean().item(),
        "oracle_utility": utility[is_best].mean().item(),
        "proxy_gap": (margin - gain).mean().item(),
        "overconfidence": overconfidence(margin, labels.preferences(is_best)[is_best]).mean().item(),
        "penalty_to_reward_std": judged.spread,
        "reply_tokens": sum(lengths) / len(lengths),
        "oracle_calls": calls,
    }


def samples_of(policy: Policy, rollout: Rollout, judged: Judged, best: Tensor, iteration: int) -> list[Sample]:
    """The best reply and the reference of each prompt as text, with the numbers that chose it."""
    rows = zip(rollout.prompts, rollout.chosen(best), rollout.references(best), strict=True)
    return [
        {
            "iteration": iteration,
            "id": prompt.name,
            "prompt": prompt.text,
            "reply": policy.decode(rollout.replies[chosen]),
            "reference": policy.decode(rollout.replies[reference]),
            "reward": float(judged.reward[b, best[b]]),
            "penalty": float(judged.penalty[b, best[b]]),
            "effective_reward": float(judged.effective[b, best[b]]),
        }
        for b, (prompt, chosen, reference) in enumerate(rows)
    ]


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSONL file; a last line without its line break is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]  # other line breaks may stand inside a reply


def cut(path: Path, last: int) -> None:
    """Drop the rows after iteration `last`."""
    kept = [row for row in read(path) if row["iteration"] <= last]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("", encoding="utf-8")
    append(replacement, kept)
    replacement.replace(path)
