"""What an iteration is measured by, and the two JSONL files it goes to."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import RunError

if TYPE_CHECKING:
    from .engine import Engine
    from .oracle import Labels
    from .penalty import Judged
    from .rollout import Rollout
    from .update import Learnt

Row = dict[str, Any]
Sample = dict[str, Any]
METRICS, SAMPLES, MEMORY = "metrics.jsonl", "samples.jsonl", "memory.jsonl"


class Clock:
    """Wall-clock seconds by phase.

    On CUDA a phase ends by waiting for the device, once: kernels run behind the Python that launches them, and without
    the wait their time would be counted to whichever later phase first reads a result. The next phase then begins on
    an idle device, so that no wait is needed there.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 4)


def peak_memory(device: torch.device) -> int:
    """Bytes: the process's largest resident set, or on CUDA the most its tensors held since the peak was last reset."""
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
    labels: Labels,
    best: Tensor,
    rollout: Rollout,
    engine: Engine,
    *,
    learnt: Learnt | None = None,
    grad_norm: float | None = None,
    learning_rate: float | None = None,
    reward_model_loss: float | None = None,
    reward_model_drift: float | None = None,
    seconds: dict[str, float] | None = None,
    peak: int = 0,
    memory_planned: dict[str, int] | None = None,
    memory_measured: dict[str, int] | None = None,
    audit: bool = False,
) -> Row:
    """The figures of one iteration, over the prompts of all ranks; what is no finite number is None.

    reward, penalty and effective_reward are means over the candidates that could be judged (effective > −∞), so that
    effective_reward = reward − γ · penalty; reply_tokens and repetition over all candidates. What needs the oracle is
    a mean over the learnt pairs (best, reference), whose labels every penalty buys, those aside whose label failed:

        oracle_utility  = U(best)                                    or p* where the oracle has no utilities
        proxy_gap       = [r(best) − r(ref)] − [U(best) − U(ref)]    or σ(r(best) − r(ref)) − p*
        oracle_scale    = "utility"                                  or "preference"
        overconfidence  = c(best) = σ(r(best) − r(ref)) − p*
        steering        = c(best) · ⟨ḡ, u(best)⟩, None where the penalty had no use for ḡ
        audit_utility   = U, or p*, of the candidates that could be judged, with `audit`: the policy's own worth

    Prompts without a candidate that could be judged are learnt from by nothing: they are counted as prompts_left_out.
    oracle_calls and oracle_failures are sums over ranks; seconds and the bytes of memory are the largest of any rank's.

    Args:
        best: (B,) int64, the candidate of each of this rank's prompts that was learnt.
        learnt, grad_norm, learning_rate, reward_model_loss, reward_model_drift: the same on all ranks already.
        seconds, memory_planned, memory_measured: by phase. peak: bytes. They are this rank's own.
        audit: ask the oracle about all candidates; what that takes beyond the labels bought is audit_calls.
    """
    own: dict[str, Any] = {
        "calls": labels.calls,  # before this function asks: labels not bought for the learning would be audits
        "failures": labels.failures,
        "seconds": seconds or {},
        "planned": memory_planned or {},
        "measured": memory_measured or {},
        "peak": max([peak, *(memory_measured or {}).values()]),
    }
    columns, scale = _columns(judged, labels, best, rollout)
    if audit:
        columns["audit"] = _audit(judged, labels)
        own["audit"] = labels.calls - own["calls"]
    ranks = engine.gather_objects([own])
    table = dict(zip(columns, engine.gather(torch.stack(list(columns.values()), 1)).T.cpu(), strict=True))
    counted, candidates = table["counted"].sum(), len(table["counted"]) * rollout.candidates
    row = {
        "iteration": iteration,
        "reward": table["reward"].sum() / counted,
        "penalty": table["penalty"].sum() / counted,
        "effective_reward": table["effective"].sum() / counted,
        **{key: table[key].nanmean() for key in PAIRED},
        "oracle_scale": scale,
        "penalty_to_reward_std": judged.spread,
        "kl": learnt.kl if learnt else None,
        "policy_loss": learnt.loss if learnt else None,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "reward_model_loss": reward_model_loss,
        "reward_model_drift": reward_model_drift,
        "reply_tokens": table["tokens"].sum() / candidates,
        "repetition": table["repetition"].sum() / candidates,
        "prompts_left_out": int((table["counted"] == 0).sum()),
        "oracle_calls": sum(rank["calls"] for rank in ranks),
        **_audited(table, ranks),
        "oracle_failures": sum(rank["failures"] for rank in ranks),
        "seconds": _largest([rank["seconds"] for rank in ranks]),
        "peak_memory_bytes": max(rank["peak"] for rank in ranks),
    }
    for key in ("planned", "measured"):
        if most := _largest([rank[key] for rank in ranks]):
            row[f"memory_{key}"] = most
    return tidy(row)


PAIRED = ("chosen_reward", "oracle_utility", "proxy_gap", "overconfidence", "steering")


def _columns(judged: Judged, labels: Labels, best: Tensor, rollout: Rollout) -> tuple[dict[str, Tensor], str]:
    """Numbers of each of this rank's prompts, (B,) float64 each, those of `PAIRED` NaN where unknown; oracle_scale."""
    counted = judged.effective.isfinite()  # (B, N)
    at = best[:, None]
    wanted = torch.zeros_like(counted).scatter(1, at, True) & counted
    learnt = wanted.any(1)  # (B,)

    def of_best(values: Tensor) -> Tensor:
        return torch.where(learnt, values.gather(1, at)[:, 0].double(), torch.nan)

    def over_candidates(values: Tensor) -> Tensor:
        return torch.where(counted, values.double(), 0.0).sum(1)

    chosen = of_best(judged.reward)
    margin = chosen - judged.reference_reward[:, 0].double()
    preference = of_best(labels.preferences(wanted))
    utilities = labels.utilities(wanted)
    overconfidence = torch.sigmoid(margin) - preference
    if utilities is None:
        utility, gap, scale = preference, overconfidence, "preference"
    else:
        utility, scale = of_best(utilities[0]), "utility"
        gap = margin - (utility - utilities[1][:, 0].double())
    steering = torch.full_like(chosen, torch.nan)
    if judged.mean_product is not None:
        steering = overconfidence * of_best(judged.mean_product)
    n = rollout.candidates
    replies = [rollout.replies[first : first + n] for first in range(0, len(rollout.replies), n + 1)]
    columns = {
        "counted": counted.sum(1).double(),
        "reward": over_candidates(judged.reward),
        "penalty": over_candidates(judged.penalty),
        "effective": over_candidates(judged.effective),
        "tokens": chosen.new_tensor([sum(map(len, some)) for some in replies]),
        "repetition": chosen.new_tensor([sum(map(repetition, some)) for some in replies]),
    }
    return columns | dict(zip(PAIRED, (chosen, utility, gap, overconfidence, steering), strict=True)), scale


def _audit(judged: Judged, labels: Labels) -> Tensor:
    """Mean U, or p*, of each prompt's judged candidates whose label could be had, (B,) float64; NaN without any."""
    counted = judged.effective.isfinite()
    utilities = labels.utilities(counted)
    return (labels.preferences(counted) if utilities is None else utilities[0]).double().nanmean(1)


def _audited(table: dict[str, Tensor], ranks: list[dict[str, Any]]) -> Row:
    if "audit" not in table:
        return {}
    return {"audit_utility": table["audit"].nanmean(), "audit_calls": sum(rank["audit"] for rank in ranks)}


def repetition(reply: Sequence[int]) -> float:
    """1 − (different 3-grams of tokens) / (3-grams), in [0, 1); 0 for replies of fewer than 4 tokens."""
    grams = list(zip(reply, reply[1:], reply[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _largest(dictionaries: list[dict[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for one in dictionaries for key in one)
    return {key: max(one[key] for one in dictionaries if key in one) for key in keys}


def tidy(value: Any) -> Any:
    """Numbers as JSON has them: tensors as numbers, NaN and infinities as None, in mappings and lists too."""
    if isinstance(value, dict):
        return {key: tidy(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(one) for one in value]
    if isinstance(value, Tensor):
        return tidy(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def samples_of(rollout: Rollout, judged: Judged, best: Tensor, iteration: int, engine: Engine) -> list[Sample]:
    """The best reply and the reference of each prompt as text, with the numbers that chose it; of all ranks' prompts.

    `unpenalised_reply` is the candidate of the highest reward, which the reward model alone would have chosen, or None
    where that reads the same as the best. Prompts without a candidate that could be judged are left out.
    """
    reward, penalty, effective = torch.stack([judged.reward, judged.penalty, judged.effective]).cpu()
    best, usable = best.cpu(), rollout.usable.cpu() & reward.isfinite()
    alone = reward.masked_fill(~usable, -torch.inf).argmax(1)
    texts = [[rollout.texts[row] for row in rows] for rows in map(rollout.chosen, (best, alone))]
    references = [rollout.texts[row] for row in rollout.references(best)]
    samples = []
    for b, (prompt, reply, unpenalised, reference) in enumerate(zip(rollout.prompts, *texts, references, strict=True)):
        if not effective[b, best[b]].isfinite():
            continue
        sample = {
            "iteration": iteration,
            "id": prompt.name,
            "prompt": prompt.text,
            "reply": reply,
            "reference": reference,
            "unpenalised_reply": None if unpenalised == reply else unpenalised,
            "reward": reward[b, best[b]],
            "penalty": penalty[b, best[b]],
            "effective_reward": effective[b, best[b]],
        }
        samples.append(tidy(sample))
    return engine.gather_objects(samples)


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL file; what is no finite number becomes null."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(tidy(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())  # no checkpoint may outlive the rows before it


def read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSONL file; a last line without its line break is left out.

    Raises:
        RunError: another line is not JSON.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # others may stand inside a reply
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path} line {number} is not JSON; put the whole file back") from error
    return rows


def split_memory(row: Row) -> tuple[Row, Row]:
    """A row without, and with nothing but, the bytes by phase: those go to a file of their own.

    So `metrics.jsonl` of a run that was stopped and resumed equals an uninterrupted one's but for `seconds` and
    `peak_memory_bytes`.
    """
    apart = {key: value for key, value in row.items() if key.startswith("memory_")}
    return {key: value for key, value in row.items() if key not in apart}, {"iteration": row["iteration"], **apart}


def read_run(folder: Path) -> list[Row]:
    """The metrics of a run, the bytes by phase put back."""
    memory = {row["iteration"]: row for row in read(folder / MEMORY)}
    return [{**memory.get(row["iteration"], {}), **row} for row in read(folder / METRICS)]


def cut(path: Path, last: int) -> None:
    """Drop the rows after iteration `last`."""
    kept = [row for row in read(path) if row["iteration"] <= last]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("", encoding="utf-8")
    append(replacement, kept)
    replacement.replace(path)
