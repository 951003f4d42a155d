"""What an iteration is measured by."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpo_train.penalty.base import within

from .records import Row, Sample, tidy

if TYPE_CHECKING:
    from fpo_train.oracle import Labels
    from fpo_train.penalty.base import Judged
    from fpo_train.processes import Processes
    from fpo_train.rollout import Rollout
    from fpo_train.update import Learnt


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
    processes: Processes,
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
    effective_reward = reward − γ · penalty; reply_tokens and repetition over all candidates. The standard deviation of
    γ · penalty within prompts, over that of the reward, is scaled_penalty_to_reward_std. What needs the oracle is a
    mean over the learnt pairs (best, reference), whose labels every penalty buys, those aside whose label failed:

        oracle_utility  = U(best)                                    or p* where the oracle has no utilities
        proxy_gap       = [r(best) − r(ref)] − [U(best) − U(ref)]    or σ(r(best) − r(ref)) − p*
        oracle_scale    = "utility"                                  or "preference"
        overconfidence  = c(best) = σ(r(best) − r(ref)) − p*
        steering        = c(best) · ⟨ḡ, u(best)⟩, None where the penalty had no use for ḡ
        oracle_gain     = U(best) − U(ref)                           or p* − ½

    The learnt pairs are the penalty's choice. The policy's own worth, which can be compared between penalties, takes
    the labels of all candidates that could be judged, a mean over prompts of their means. It is there with `audit`,
    and without it where it takes no question: the labels are bought already, or read off what the base has read:

        audit_utility   = U(z)                                       or p*
        audit_gain      = U(z) − U(ref)                              or p* − ½

    Prompts without a candidate that could be judged are learnt from by nothing: they are counted as prompts_left_out.
    oracle_calls and oracle_failures are sums over ranks; seconds and the bytes of memory are the largest of any rank's.

    Args:
        best: (B,) int64, the candidate of each of this rank's prompts that was learnt.
        learnt, grad_norm, learning_rate, reward_model_loss, reward_model_drift: the same on all ranks already.
        seconds, memory_planned, memory_measured: by phase. peak: bytes. They are this rank's own.
        audit: ask the oracle about all candidates whatever it takes.

    What is asked for the metrics beyond the labels bought is audit_calls, and its time seconds["audit"].
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
    if audit or all(processes.gather_objects([labels.covers(judged.effective.isfinite())])):
        clock = Clock(judged.effective.device)
        with clock("audit"):
            columns |= _audit(judged, labels)
        own["audit"], own["seconds"] = labels.calls - own["calls"], {**own["seconds"], **clock.seconds}
    ranks = processes.gather_objects([own])
    table = dict(zip(columns, processes.gather(torch.stack(list(columns.values()), 1)).T.cpu(), strict=True))
    counted, candidates = table["counted"].sum(), len(table["counted"]) * rollout.candidates
    row = {
        "iteration": iteration,
        "reward": table["reward"].sum() / counted,
        "penalty": table["penalty"].sum() / counted,
        "effective_reward": table["effective"].sum() / counted,
        **{key: table[key].nanmean() for key in PAIRED},
        "oracle_scale": scale,
        "penalty_to_reward_std": judged.spread,
        "scaled_penalty_to_reward_std": (table["penalty_square"].sum() / table["reward_square"].sum()).sqrt(),
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


PAIRED = ("chosen_reward", "oracle_utility", "proxy_gap", "overconfidence", "steering", "oracle_gain")


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
        utility, gap, gain, scale = preference, overconfidence, preference - 0.5, "preference"
    else:
        utility, scale = of_best(utilities[0]), "utility"
        gain = utility - utilities[1][:, 0].double()
        gap = margin - gain
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
        "reward_square": within(judged.reward.double(), counted).square().sum(1),
        "penalty_square": within((judged.reward - judged.effective).double(), counted).square().sum(1),
        "tokens": chosen.new_tensor([sum(map(len, some)) for some in replies]),
        "repetition": chosen.new_tensor([sum(map(repetition, some)) for some in replies]),
    }
    paired = (chosen, utility, gap, overconfidence, steering, gain)
    return columns | dict(zip(PAIRED, paired, strict=True)), scale


def _audit(judged: Judged, labels: Labels) -> dict[str, Tensor]:
    """Of each prompt's judged candidates whose label could be had, means (B,) float64; NaN without any."""
    counted = judged.effective.isfinite()
    utilities = labels.utilities(counted)
    worth = (labels.preferences(counted) if utilities is None else utilities[0]).double().nanmean(1)
    base = 0.5 if utilities is None else utilities[1][:, 0].double()
    return {"audit_utility": worth, "audit_gain": worth - base}


def _audited(table: dict[str, Tensor], ranks: list[dict[str, Any]]) -> Row:
    if "audit_utility" not in table:
        return {}
    means = {key: table[key].nanmean() for key in ("audit_utility", "audit_gain")}
    return {**means, "audit_calls": sum(rank["audit"] for rank in ranks)}


def repetition(reply: Sequence[int]) -> float:
    """1 − (different 3-grams of tokens) / (3-grams), in [0, 1); 0 for replies of fewer than 4 tokens."""
    grams = list(zip(reply, reply[1:], reply[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _largest(dictionaries: list[dict[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for one in dictionaries for key in one)
    return {key: max(one[key] for one in dictionaries if key in one) for key in keys}


def samples_of(
    rollout: Rollout,
    judged: Judged,
    best: Tensor,
    iteration: int,
    processes: Processes,
    labels: Labels | None = None,
) -> list[Sample]:
    """The best reply and the reference of each prompt as text, with the numbers that chose it; of all ranks' prompts.

    `unpenalised_reply` is the candidate of the highest reward, which the reward model alone would have chosen, or None
    where that reads the same as the best. With `labels`, each reply's utility (or p*) is beside it as far as it is
    known, and the other replies' reward and penalty. Prompts without a candidate that could be judged are left out.
    """
    reward, penalty, effective = torch.stack([judged.reward, judged.penalty, judged.effective]).cpu()
    best, usable = best.cpu(), rollout.usable.cpu() & reward.isfinite()
    alone = reward.masked_fill(~usable, -torch.inf).argmax(1)
    texts = [[rollout.texts[row] for row in rows] for rows in map(rollout.chosen, (best, alone))]
    references = [rollout.texts[row] for row in rollout.references(best)]
    utility, base = (known.cpu() for known in labels.known()) if labels else (None, None)
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
        if utility is not None and base is not None:
            sample["utility"] = utility[b, best[b]]
            sample["reference_reward"], sample["reference_utility"] = judged.reference_reward[b, 0], base[b, 0]
            if unpenalised != reply:
                sample["unpenalised_reward"], sample["unpenalised_penalty"] = reward[b, alone[b]], penalty[b, alone[b]]
                sample["unpenalised_utility"] = utility[b, alone[b]]
        samples.append(tidy(sample))
    return processes.gather_objects(samples)
