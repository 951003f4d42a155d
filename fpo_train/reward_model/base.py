"""What every reward model can do: score, be retrained, go back to an earlier state, tell how far it has come."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, softplus

import fpo_kernels as fk
from fpo_train.config import RunConfig
from fpo_train.data.turns import Talk
from fpo_train.errors import NotFinite, RunError
from fpo_train.policy import wide
from fpo_train.policy.generation import check_finite
from fpo_train.policy.optimizers import largest, make_optimizer, make_schedule, move, restore, state_of
from fpo_train.processes import Ranks

if TYPE_CHECKING:
    from fpo_train.rollout import Readings, Said

    from .replay import Pair


class Scores(NamedTuple):
    """What a reward model's module returns."""

    logits: Tensor  # (R, 1)


@dataclass(frozen=True)
class Reading:
    """What a reward model reads of R rows."""

    batch: dict[str, Tensor] | None
    """Keyword arguments of its module, (R, T) each, padded on the right."""
    features: Tensor | None
    """(R, H) fp32, what its score head reads, where all beneath the head is frozen and has been run."""

    def rows(self, index: Tensor) -> Reading:
        """The chosen rows, trimmed to the longest of them."""
        batch = None
        if self.batch is not None:
            width = int(self.batch["attention_mask"][index].sum(1).max())
            batch = {key: value[index, :width] for key, value in self.batch.items()}
        return Reading(batch, None if self.features is None else self.features[index])

    def __len__(self) -> int:
        some = self.features if self.features is not None else next(iter((self.batch or {}).values()))
        return len(some)

    def pieces(self, rows_at_once: int) -> Iterator[Reading]:
        """All rows, `rows_at_once` at a time (0: together)."""
        some = self.features if self.features is not None else next(iter((self.batch or {}).values()))
        for index in torch.arange(len(self), device=some.device).split(rows_at_once or len(self)):
            yield self.rows(index)


@dataclass(frozen=True)
class State:
    """The trained weights as one training left them, on the CPU, and the learning rate that it took."""

    learning_rate: float
    weights: dict[str, Tensor]


class RewardModel(ABC):
    """A module that maps batches to a score a row, its score head, and what of it is trained.

    Dropout is off, also while it is trained, unless `score` is asked for it.

    Attributes:
        module: called as module(**batch); returns something with `.logits` (R, 1).
        head: the linear score at its end. trainable: the trained parameters by their names in `module`.
        history: the last `penalty.checkpoints` states, the newest last: the weights as they are.
        loaded: model and tokenizer of its own, where it does not sit on the policy's.
    """

    loaded: tuple[nn.Module, Any] | None = None
    comes_trained = False
    """Whether its score head was trained before, and came with the model's files."""

    def __init__(self, module: nn.Module, head: nn.Linear, trained: list[str], config: RunConfig, processes: Ranks):
        self.module = module.eval()
        self.head = head
        self.config = config.reward_model
        self._processes = processes
        named = dict(module.named_parameters())
        self.trainable: dict[str, nn.Parameter] = {name: named[name] for name in trained}
        settings = config.reward_model
        self.optimizer = make_optimizer(
            self.trainable.values(), settings.optimizer, settings.learning_rate, settings.weight_decay
        )
        trainings = max(1, settings.steps * (config.iterations // settings.every))
        self.scheduler = make_schedule(self.optimizer, settings.schedule, settings.warmup, trainings)
        self.history: deque[State] = deque(maxlen=config.penalty.checkpoints)
        self._begin()

    @property
    def device(self) -> torch.device:
        """Where the score head is."""
        return self.head.weight.device

    @abstractmethod
    def read(self, rollout: Said, readings: Readings, rows_at_once: int = 0) -> Reading:
        """What it reads of all rows of a rollout."""

    @abstractmethod
    def read_pairs(self, pairs: Sequence[Pair], rows_at_once: int = 0) -> Reading:
        """What it reads of pairs, 2n rows: chosen, reference, chosen, reference, …"""

    def check(self, texts: Sequence[tuple[Talk, str]]) -> None:  # noqa: B027 (the policy's own tokens need no check)
        """See that it can read these prompts and replies.

        Raises:
            RunError: it cannot.
        """

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what was trained, and a `config.json` that says on what it sits and what it reads."""

    def names(self, parameters: str, setting: str = "penalty.parameters") -> list[str]:
        """Names in `module` of the weights that `penalty.parameters`, or another `setting`, chooses.

        Raises:
            RunError: a choice that names nothing of this reward model.
        """
        own = [name for name, _ in self.module.named_parameters() if self._is_own(name)]
        head = {id(p) for p in self.head.parameters()}
        found = {
            "head": [n for n, p in self.module.named_parameters() if id(p) in head],
            "lora": [n for n in own if ".lora_" in n],
            "all": own,
            "trainable": list(self.trainable),
        }.get(parameters)
        if found is None:
            patterns = [pattern.strip() for pattern in parameters.split(",")]
            lost = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in own)]
            if lost:
                raise RunError(f"{setting}: {lost[0]!r} names no weight of the reward model")
            found = [name for name in own if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not found:
            raise RunError(f"{setting}: the reward model has no {parameters} weights")
        return found

    def _is_own(self, name: str) -> bool:
        """Whether a parameter of `module` is the reward model's, and not the policy's adapter's."""
        return True

    @torch.no_grad()
    def score(self, reading: Reading, rows_at_once: int = 0, dropout: bool = False) -> Tensor:
        """r of every row, (R,) fp32 (float64 of a float64 module); with `dropout`, as a module in train mode scores.

        Raises:
            NotFinite: a score that is not a finite number; where `reward_model.nan_scores` is "drop", none that is.
        """
        if reading.features is not None and not dropout:
            return self.checked(self._of_features(reading.features))
        if reading.batch is None:
            raise RuntimeError("this reading has features alone")
        self.module.train(dropout)
        try:
            parts = [self.module(**piece.batch).logits[:, 0] for piece in reading.pieces(rows_at_once) if piece.batch]
        finally:
            self.module.eval()
        return self.checked(torch.cat(parts), reading)

    def checked(self, reward: Tensor, reading: Reading | None = None) -> Tensor:
        """Scores in fp32 or float64; see `score` for those that are not numbers. `reading`: what they are of."""
        lost = (~reward.isfinite()).nonzero().flatten().tolist()
        missing = len(lost)
        if missing and self.config.nan_scores == "fail":
            raise NotFinite(
                f"reward_model: {missing} of {len(reward)} scores are not numbers"
                f"{self._where(lost[0], reading)}; reward_model.dtype is "
                f"{self.config.dtype}, and nan_scores 'drop' would leave such candidates out"
            )
        if missing and missing == len(reward):
            raise NotFinite(
                f"reward_model: not one of {missing} scores is a finite number; reward_model.dtype is "
                f"{self.config.dtype}, reward_model.learning_rate {self.config.learning_rate}"
            )
        return wide(reward)

    def _where(self, row: int, reading: Reading | None) -> str:
        """Which module made the number that is none of a row that is read anew."""
        if reading is None or reading.batch is None:
            return ""
        batch = reading.rows(torch.tensor([row], device=reading.batch["attention_mask"].device)).batch or {}
        faults = fk.forward_faults(self.module, batch)
        return f", the first of row {row + 1}, where {faults[0].where} {faults[0].what} such a one" if faults else ""

    def gradient(self, pairs: Sequence[Pair], rows_at_once: int = 0) -> Tensor:
        """Set the gradient of mean BCE(σ(r(z) − r(ref)), p*) over `pairs`; returns that mean, in nats a pair.

        Args:
            pairs: all ranks' alike; each rank takes its part, and gradients and means are over all of them.
            rows_at_once: replies on a tape, an even number in effect; 0: all.
        """
        self.optimizer.zero_grad(set_to_none=True)
        mine, total = pairs[self._processes.rank :: self._processes.world], torch.zeros((), device=self.device)
        at_once = max(1, rows_at_once // 2 if rows_at_once else len(mine))
        for start in range(0, len(mine), at_once):
            some = mine[start : start + at_once]
            label = torch.tensor([pair.preference for pair in some], device=self.device)
            margin = self.margins(some)
            loss = binary_cross_entropy_with_logits(margin, label.to(margin.dtype), reduction="sum") / len(pairs)
            loss.backward()
            total += loss.detach().float()
        self._processes.sum_gradients(self.trainable.values())
        return self._processes.total(total)

    def margins(self, pairs: Sequence[Pair]) -> Tensor:
        """r(z) − r(ref) of each pair, (n,), fp32 or float64, with a graph to what is trained."""
        reading = self.read_pairs(pairs)
        if reading.features is not None:
            reward = self._of_features(reading.features)
        else:
            reward = wide(self.module(**(reading.batch or {})).logits[:, 0])
        return reward[::2] - reward[1::2]

    def _of_features(self, features: Tensor) -> Tensor:
        """Scores (R,) of what the head reads, (R, H): in half precision most candidates of a prompt would tie."""
        weight, bias = self.head.weight, self.head.bias
        return linear(features.to(wide(weight).dtype), wide(weight), None if bias is None else wide(bias))[:, 0]

    def step(self) -> None:
        """Step optimizer and schedule, and keep the new weights as the newest state.

        Raises:
            NotFinite: a gradient that is not finite; nothing has moved then. Or a step that has left such weights.
        """
        how = "a smaller reward_model.learning_rate may help, or a wider reward_model.dtype"
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        check_finite(largest(gradients), f"retrain: the reward model's gradient is not finite; {how}")
        rate = float(self.scheduler.get_last_lr()[0])
        said = f"retrain: the step has left weights that are not finite numbers; {how}"
        move(self.optimizer, self.trainable.values(), said)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.history.append(State(rate, self.weights()))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the trained weights on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.trainable.items()}

    @contextmanager
    def at(self, state: State) -> Iterator[None]:
        """The weights of an earlier state; those there are now come back bit for bit."""
        now = {name: p.detach().clone() for name, p in self.trainable.items()}
        try:
            self._put(state.weights)
            yield
        finally:
            self._put(now)

    def drift(self) -> float:
        """‖φ − φ₀‖ / ‖φ₀‖ over the trained weights, φ₀ those it began with; ‖φ‖ where they are 0."""
        moved = sum(
            float((p.detach().cpu() - self._start[n]).double().square().sum()) for n, p in self.trainable.items()
        )
        whole = sum(float(p.double().square().sum()) for p in self._start.values())
        return (moved / (whole or 1.0)) ** 0.5

    @property
    def to_fit(self) -> int:
        """Pairs that its score head is to be fitted on before the first iteration; 0: it is taken as it is."""
        return 0 if self.comes_trained and self.config.fit == "fresh" else self.config.fit_pairs

    def begins(self) -> str:
        """What becomes of its score head before the first iteration, in words."""
        came = f"trained, from {self.config.classifier}" if self.comes_trained else "fresh"
        if self.to_fit:
            return f"{came}; fitted {'anew ' if self.comes_trained else ''}on {self.to_fit} pairs"
        how = "; reward_model.fit always fits it anew" if self.comes_trained and self.config.fit_pairs else ""
        return f"{came}; taken as it is{how}"

    def reads(self, tokenizer: Any) -> str:
        """What it reads of a prompt and a reply, in words; `tokenizer`: the policy's, on which it may sit."""
        own = self.loaded[1] if self.loaded else tokenizer
        if self.config.input == "chat" and own.chat_template is None:
            hint = "; reward_model.input pair or reply reads otherwise" if self.loaded else ""
            return f"prompt, blank line and reply as one text, since its tokenizer has no chat template{hint}"
        return {
            "chat": "prompt and reply by its tokenizer's chat template",
            "pair": "prompt and reply as a pair of texts",
            "reply": "the reply alone",
            "written": "turns by its tokenizer's chat template, and a text prompt with the reply right behind it",
        }[self.config.input]

    def fit(self, pairs: Sequence[Pair], rows_at_once: int = 0) -> None:
        """Set the head's weight by `fit_logistic` on pairs, and begin from there."""
        found = [pair.features for pair in pairs]
        if any(one is None for one in found):
            features = self.head_inputs(self.read_pairs(pairs), rows_at_once)
        else:
            features = torch.cat([torch.stack(one) for one in found if one is not None])
        check_finite(features, "reward_model: what its score head reads of the first pairs is not finite numbers")
        labels = torch.tensor([pair.preference for pair in pairs])
        weight = fit_logistic((features[::2] - features[1::2]).cpu(), labels, self.config.fit_ridge)
        with torch.no_grad():
            self.head.weight.copy_(weight[None].to(self.head.weight))
        self._begin()

    @torch.no_grad()
    def head_inputs(self, reading: Reading, rows_at_once: int = 0) -> Tensor:
        """What the score head reads, (R, H) fp32 or float64, from one forward of the rest."""
        if reading.features is not None:
            return reading.features
        found: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        try:
            for piece in reading.pieces(rows_at_once):
                self.module(**(piece.batch or {}))
        finally:
            hook.remove()
        features = torch.cat(found)
        return wide(features)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, and what `drift` compares with."""
        history = [{"learning_rate": state.learning_rate, "weights": state.weights} for state in self.history]
        return {
            "weights": self.weights(),
            "start": self._start,
            "history": history,
            **copy.deepcopy(state_of(self.optimizer, self.scheduler)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._put(state["weights"])
        self._start = dict(state["start"])
        self.history.clear()
        self.history.extend(State(**one) for one in state["history"])
        restore(self.optimizer, self.scheduler, copy.deepcopy(state))

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.trainable.items():
            parameter.copy_(weights[name])

    def _begin(self) -> None:
        self._start = self.weights()
        self.history.clear()
        self.history.append(State(self.config.learning_rate, self.weights()))


def fit_logistic(difference: Tensor, preference: Tensor, ridge: float) -> Tensor:
    """The minimiser w (H,) of Σ BCE(σ(w·Δh), p*) + λ/2‖w‖², by Newton's method in float64.

    Args:
        difference: Δh = h(z) − h(ref), (n, H). preference: p*, (n,) in [0, 1].
        ridge: λ relative to the mean diagonal of ΣΔhΔhᵀ.
    """
    x, p = difference.double(), preference.double()
    damping = (ridge * x.square().sum() / x.shape[1]).clamp_min(1e-12)  # pairs may all be alike
    w = x.new_zeros(x.shape[1])
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

    def loss(w: Tensor) -> float:
        return float((softplus(x @ w) - p * (x @ w)).sum() + damping / 2 * (w @ w))

    for _ in range(100):
        q = torch.sigmoid(x @ w)
        gradient = x.T @ (q - p) + damping * w
        hessian = x.T @ (x * (q * (1 - q))[:, None]) + damping * eye
        step, now = torch.linalg.solve(hessian, gradient), loss(w)
        while loss(w - step) > now + 1e-12 * abs(now) and step.norm() > 1e-10 * w.norm():
            step = step / 2  # with little ridge a whole step can overshoot, and the next one further still
        w = w - step
        if step.norm() <= 1e-10 * w.norm():
            break
    return w
