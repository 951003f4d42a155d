"""Preference pairs of real replies with labels that are known to be wrong, and reward models trained on them.

The replies are those of SmolLM2-135M to sixteen questions that the collapse study kept. Of a pair, one replies to the
question and the other to another question: the first is the better one, and a reward model can learn to see it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fpo_train.attribute.inputs import TrainingPair
from fpo_train.config import RewardModelConfig, RunConfig
from fpo_train.data.prompts import Prompt
from fpo_train.processes import Processes
from fpo_train.reward_model.base import fit_logistic
from fpo_train.reward_model.classifier import ClassifierRewardModel
from fpo_train.reward_model.replay import FIT_PLACE, Pair

STUDIES = Path(__file__).parent / "results"
MODEL = "minilm"
LABELS, LENGTH = "label errors", "length bias"
RIDGE = 0.1  # of the head's fit, as `reward_model.fit_ridge`
PAIRS_AT_ONCE, RATE, EPOCHS, RANK = 8, 1e-3, 2, 8  # of the training of an adapter, behind the head's fit
LAYERS = tuple(f"layer.5.{name}" for name in ("attention.self.query", "attention.self.value", "output.dense"))


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What a reward model is trained on, which of it is planted, and pairs that are rightly labelled.

    Attributes:
        train: planted ones have a preference of 0 for `chosen`, as which the better reply is written everywhere; what
            a labeller would have written is `as_labelled`. planted: (n,) bool. valid: other replies' pairs.
    """

    train: list[TrainingPair]
    planted: torch.Tensor
    valid: list[TrainingPair]

    @property
    def as_labelled(self) -> list[TrainingPair]:
        """The training pairs with the reply that was preferred as `chosen`."""
        return [
            pair if pair.preference else replace(pair, chosen=pair.rejected, rejected=pair.chosen, preference=1.0)
            for pair in self.train
        ]


def replies() -> dict[str, list[str]]:
    """Question → the different replies to it, in order."""
    found: dict[str, set[str]] = {}
    for path in STUDIES.glob("collapse*/*/*/samples.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["prompt"], set()).add(row["reference"])
    return {question: sorted(found[question]) for question in sorted(found)}


def labelled(kind: str, train: int, valid: int, share: float, seed: int) -> Labelled:
    """Pairs drawn from all replies; no reply to the question is in two of them.

    Args:
        kind: LABELS: of `share` of the training pairs the label is wrong. LENGTH: one reply of each pair, either as
            often, goes on with another reply to its own question; `share` of all training pairs, drawn from those whose
            better reply is the short one, prefer the long one. The validation pairs are rightly labelled; with LENGTH
            their better replies are all short, which is what shows the bias.
    """
    rng, known = random.Random(seed), replies()
    questions = list(known)
    pool = [(question, text) for question in questions for text in known[question]]
    rng.shuffle(pool)
    pairs, long = [], []
    for number, (question, good) in enumerate(pool[: train + valid]):
        other = rng.choice([one for one in questions if one != question])
        bad = rng.choice(known[other])
        is_long = rng.random() < 0.5 or number >= train  # the worse reply, with LENGTH
        if kind == LENGTH:
            more = rng.choice(known[other if is_long else question])
            good, bad = (good, f"{bad} {more}") if is_long else (f"{good} {more}", bad)
        where = f"pair {number}"
        pairs.append(TrainingPair(where=where, prompt=question, chosen=good, rejected=bad, preference=1.0))
        long.append(is_long)
    open_to = [n for n in range(train) if kind == LABELS or long[n]]
    wrong = set(rng.sample(open_to, round(share * train)))
    marked = [replace(pair, preference=0.0) if n in wrong else pair for n, pair in enumerate(pairs[:train])]
    planted = torch.tensor([n in wrong for n in range(train)])
    return Labelled(train=marked, planted=planted, valid=pairs[train:])


def trained(
    data: Labelled, adapter: bool, device: torch.device, seed: int
) -> tuple[ClassifierRewardModel, torch.Tensor]:
    """MiniLM with a score head at the optimum of the ridge-penalised loss, and what that reads of the pairs, (2n, H).

    Args:
        adapter: then train LoRA factors of its last block, and the head, by AdamW.
    """
    settings = RewardModelConfig(
        kind="classifier",
        model=MODEL,
        input="pair",
        train="lora" if adapter else "head",
        lora_rank=RANK,
        lora_alpha=RANK,
        lora_targets=LAYERS,
        learning_rate=RATE,
    )
    model = ClassifierRewardModel(RunConfig(reward_model=settings), Processes(), device)
    pairs = [_as_pair(pair) for pair in data.train]
    features = torch.cat([model.head_inputs(model.read_pairs(pairs[n : n + 16])) for n in range(0, len(pairs), 16)])
    labels = torch.tensor([pair.preference for pair in pairs])
    weight = fit_logistic((features[::2] - features[1::2]).cpu(), labels, RIDGE)
    with torch.no_grad():
        model.head.weight.copy_(weight[None].to(model.head.weight))
    for epoch in range(EPOCHS if adapter else 0):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(EPOCHS * seed + epoch)).tolist()
        for start in range(0, len(order), PAIRS_AT_ONCE):
            model.gradient([pairs[n] for n in order[start : start + PAIRS_AT_ONCE]])
            model.step()
    return model, features


def _as_pair(pair: TrainingPair) -> Pair:
    return Pair(
        prompt=Prompt.of(pair.where, pair.prompt, ()),
        chosen=(),
        reference=(),
        chosen_text=pair.chosen,
        reference_text=pair.rejected,
        preference=pair.preference,
        iteration=FIT_PLACE,
        features=None,
    )
