"""Steering penalties: r̃(z) = r(z) − γ · penalty(z) (Gauthier, Bach, Jordan 2026).

| none      | 0                     |
| practical | ⟨∇r(z), u(z)⟩         |    u = ∇r(z) − ∇r(ref)
| relaxed   | c(z) · ⟨∇r(z), u(z)⟩  |    c = σ(r(z) − r(ref)) − p*
| tracin    | c(z) · ⟨ḡ, u(z)⟩      |    ḡ = mean of ∇r over the iteration's candidates, z included
| exact     | c(z) · ⟨ḡ, H⁻¹u(z)⟩   |    H = Σ σ'(Δ)uuᵀ + λI over the newest labelled pairs
| residual  | ĉ(z) · ⟨∇r(z), u(z)⟩  |    ĉ foretold from the newest labelled pairs, see `residual`

∇ is over `penalty.parameters`. Over a score head H is the very Hessian of its loss; elsewhere u is a sketch and H the
Gauss–Newton matrix. While no pair is labelled, `exact` and `residual` are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fpo_kernels as fk
from fpo_train.config import PenaltyConfig
from fpo_train.errors import NotFinite
from fpo_train.oracle import Labels
from fpo_train.processes import Ranks
from fpo_train.reward_model import Reading, RewardModel
from fpo_train.reward_model.replay import Replay
from fpo_train.rollout import Said

from .gradients import EngineGradients, HeadGradients, Kept, gradients, mean_of, refusals
from .residual import expected_overconfidence

LABELLED = ("relaxed", "tracin", "exact")  # kinds whose penalty of a candidate takes the candidate's own label


class Judged(NamedTuple):
    """Scored candidates, (B, N): `penalty` in the units of γ, so that effective = reward − γ · penalty."""

    reward: Tensor
    reference_reward: Tensor
    """(B, 1)."""
    penalty: Tensor
    effective: Tensor
    """−∞ where a candidate is not usable, has no score, or lacks the label that its penalty needs; never NaN."""
    spread: float
    """Standard deviation of the penalty in the paper's own units, over that of the reward, within prompts."""
    product: Tensor | None = None
    """⟨∇r(z), u(z)⟩ at the present weights, where the penalty had use for it."""
    mean_product: Tensor | None = None
    """⟨ḡ, u(z)⟩ at the present weights, where the penalty had use for it or it costs nothing."""

    @property
    def is_best(self) -> Tensor:
        """The candidate of each prompt with the largest effective reward, (B, N) bool; none where none was judged."""
        best = torch.zeros_like(self.effective, dtype=torch.bool).scatter(1, self.effective.argmax(1, True), True)
        return best & self.effective.isfinite()


class Term(NamedTuple):
    """A penalty at one state of the reward model; see `Judged`."""

    reward: Tensor
    reference_reward: Tensor
    penalty: Tensor
    product: Tensor | None
    mean_product: Tensor | None


def overconfidence(margin: Tensor, preference: Tensor) -> Tensor:
    """c = σ(r(z) − r(ref)) − p*, in [−1, 1]."""
    return torch.sigmoid(margin) - preference


class Penalty:
    """One kind of penalty and the running scale that `gamma_units="reward_std"` needs.

    Args:
        dropout: score with dropout on where the kind is `none` (`reward_model.dropout_when_scoring`).
    """

    DECAY = 0.9  # weight of the past in the running variances, an iteration: a memory of about ten

    def __init__(self, config: PenaltyConfig, processes: Ranks, seed: int, dropout: bool = False) -> None:
        self.config = config
        self._processes = processes
        self._seed = seed
        self._dropout = dropout
        self._reward_variance = self._penalty_variance = 0.0
        self._kept = Kept()  # through iterations, states and readings

    def __call__(
        self,
        reward_model: RewardModel,
        reading: Reading,
        labels: Labels,
        replay: Replay,
        rollout: Said,
        rows_at_once: int = 0,
        learn: bool = True,
    ) -> Judged:
        """Judge a rollout's candidates, read as `reading`; statistics are over the candidates of all processes.

        `labels` are asked for where the kind needs them. `rows_at_once` sequences are on a tape; 0: all. Without
        `learn` the running scale is taken as it is (that of these candidates, where there is none yet).

        Raises:
            NotFinite: scores or penalties that are not finite numbers, unless `reward_model.nan_scores` is "drop".
        """
        question = Question(self, reward_model, reading, labels, replay, rollout, rows_at_once)
        now = question.term()
        raw = now.penalty
        if self.config.checkpoints > 1 and self.config.kind != "none":
            *earlier, present = reward_model.history
            raw = present.learning_rate * raw
            for state in earlier:
                with reward_model.at(state):
                    raw = raw + state.learning_rate * question.term().penalty
        judged = rollout.usable & now.reward.isfinite() & now.reference_reward.isfinite() & raw.isfinite()
        lost = self._lost(judged, now, labels, rollout.usable)
        if lost.any() and reward_model.config.nan_scores == "fail":
            raise NotFinite(
                f"penalty: {int(lost.sum())} of {judged.numel()} are not finite numbers though their scores are"
                f"{question.where(lost)}; reward_model.dtype may be too narrow, or reward_model.learning_rate too large"
            )
        spread, scale = self._scale(rollout, now.reward, raw, judged, learn)
        penalty = raw * scale
        effective = (now.reward - self.config.gamma * penalty).masked_fill(~judged, -torch.inf)
        return Judged(now.reward, now.reference_reward, penalty, effective, spread, now.product, now.mean_product)

    def _lost(self, judged: Tensor, now: Term, labels: Labels, usable: Tensor) -> Tensor:
        """Which candidates have no penalty for all their scores, and for the label that it needs, (B, N) bool."""
        lost = usable & now.reward.isfinite() & now.reference_reward.isfinite() & ~judged
        if self.config.kind in LABELLED and lost.any():
            lost = lost & labels.preferences(usable).isfinite()
        return lost

    def _scale(
        self, rollout: Said, reward: Tensor, raw: Tensor, judged: Tensor, learn: bool = True
    ) -> tuple[float, float]:
        """The ratio of the spreads, and what turns the raw penalty into the units of γ.

        Spreads are around each prompt's own mean, since candidates compete within a prompt. The iteration at hand
        counts in the running variances at once; one without a penalty (`exact`, `residual` before any label) does not
        count, for it would make the later ones too heavy.
        """
        of_reward, of_penalty, count = self._squares(rollout, reward, raw, judged)
        spread = (of_penalty / of_reward) ** 0.5 if of_reward else 0.0
        if self.config.gamma_units == "raw":
            return spread, 1.0
        mine, theirs = self._reward_variance, self._penalty_variance
        if of_penalty and (learn or not theirs):
            keep = self.DECAY
            mine = keep * mine + (1 - keep) * of_reward / count
            theirs = keep * theirs + (1 - keep) * of_penalty / count
        if learn:
            self._reward_variance, self._penalty_variance = mine, theirs
        return spread, (mine / theirs) ** 0.5 if theirs else 0.0

    def _squares(self, rollout: Said, reward: Tensor, raw: Tensor, judged: Tensor) -> tuple[float, float, float]:
        """Σ(r − r̄)² and Σ(penalty − mean)² around the prompts' own means, and how many were judged, of all ranks."""
        squares = [within(values, judged).square().sum() for values in (reward, raw)]
        sums = torch.stack([*squares, judged.sum().to(squares[0])])
        of_reward, of_penalty, count = self._processes.total(sums.double()).tolist()
        return of_reward, of_penalty, count

    def state(self) -> dict[str, float]:
        """The running variances, for a checkpoint."""
        return {"reward_variance": self._reward_variance, "penalty_variance": self._penalty_variance}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state()`."""
        self._reward_variance = state["reward_variance"]
        self._penalty_variance = state["penalty_variance"]


class Question:
    """The penalty of one rollout, to be asked at one state of the reward model after another."""

    def __init__(
        self,
        penalty: Penalty,
        reward_model: RewardModel,
        reading: Reading,
        labels: Labels,
        replay: Replay,
        rollout: Said,
        rows_at_once: int,
    ) -> None:
        self._config, self._processes, self._seed = penalty.config, penalty._processes, penalty._seed
        self._dropout, self._kept = penalty._dropout, penalty._kept
        self._reward_model, self._reading, self._labels = reward_model, reading, labels
        self._usable, self._rows_at_once = rollout.usable, rows_at_once
        self._rows, self._references = rollout.pairs()
        self._pairs = replay.newest(self._config.pairs) if self._config.kind in ("exact", "residual") else []
        self._pair_reading = reward_model.read_pairs(self._pairs, rows_at_once) if self._pairs else None

    def where(self, lost: Tensor) -> str:
        """Where the first of these candidates' (B, N) gradients are lost."""
        of = self._gradients(self._reading)
        row = self._rows[lost.flatten()][:1]
        told = of.fault(row) if isinstance(of, EngineGradients) else ""
        return f"; of row {int(row) + 1} {told}" if told else ""

    def term(self) -> Term:
        """The penalty at the weights as they are, in the paper's own units."""
        kind, rows, references = self._config.kind, self._rows, self._references
        of: HeadGradients | EngineGradients | None = None
        if kind != "none" or self._reading.features is not None:
            of = self._gradients(self._reading)
        product = mean_product = None
        if of is not None and kind in ("practical", "relaxed", "residual"):
            found, reward, reference_reward = of.steering(rows, references)
            product = found.view_as(self._usable)
            if not isinstance(of, HeadGradients):  # those have asked for it
                self._reward_model.checked(torch.cat([reward, reference_reward]))
        else:
            dropout = self._dropout and kind == "none"
            every = self._reward_model.score(self._reading, self._rows_at_once, dropout)
            reward, reference_reward = every[rows], every[references]
        reward = reward.view_as(self._usable)
        reference_reward = reference_reward.view_as(self._usable)[:, :1]
        over = rows[(self._usable & reward.isfinite()).flatten()]
        if of is not None and (of.free or kind == "tracin"):
            mean_product = of.mean_products(rows, references, over).view_as(self._usable)
        if of is None or kind == "none":
            penalty = torch.zeros_like(reward)
        elif kind == "practical":
            penalty = _known(product)
        elif kind == "residual":
            penalty = self._expected(of).to(reward) * _known(product)
        else:
            c = overconfidence(reward - reference_reward, self._labels.preferences(self._usable).to(reward))
            if kind == "exact":
                penalty = self._exact(of, over, c)
            else:
                penalty = c * _known(product if kind == "relaxed" else mean_product)
        return Term(reward, reference_reward, penalty, product, mean_product)

    def _gradients(self, reading: Reading) -> HeadGradients | EngineGradients:
        config, rows = self._config, self._rows_at_once
        return gradients(self._reward_model, reading, config, self._processes, self._seed, rows, self._kept)

    def _features(self, of: HeadGradients | EngineGradients) -> tuple[Tensor, Tensor]:
        """Gradient features of the candidates and of their references, (B·N, k) each; a reference's made once."""
        needed, place = torch.cat([self._rows, self._references]).unique(return_inverse=True)
        found = of.features(needed)[place]
        return found[: len(self._rows)], found[len(self._rows) :]

    def _labelled(self) -> tuple[Tensor, Tensor, Tensor]:
        """u (m, k), margins Δ and labels p* (m,) of the newest labelled pairs, at the weights as they are.

        A reply that is its own reference has u = 0 and Δ = 0 to the bit: what rounding leaves of them is no direction.
        """
        if self._pair_reading is None:
            raise RuntimeError("no pair is labelled yet")
        every = torch.arange(2 * len(self._pairs), device=self._rows.device)
        features = self._gradients(self._pair_reading).features(every).double()
        reward = self._reward_model.score(self._pair_reading, self._rows_at_once).double()
        label = torch.tensor([pair.preference for pair in self._pairs], device=reward.device, dtype=torch.float64)
        apart = label.new_tensor([pair.differs for pair in self._pairs])
        u, margin = features[::2] - features[1::2], reward[::2] - reward[1::2]
        return u * apart[:, None], margin * apart, label

    def _expected(self, of: HeadGradients | EngineGradients) -> Tensor:
        """ĉ of every candidate, (B, N)."""
        if not self._pairs:
            return torch.zeros_like(self._usable, dtype=torch.float64)
        u, margin, label = self._labelled()
        own, other = self._features(of)
        residuals = overconfidence(margin, label)
        found = expected_overconfidence(
            own.double() - other.double(), u, residuals, self._config.lengths, self._config.noises
        )
        return found.overconfidence.view_as(self._usable)

    def _exact(self, of: HeadGradients | EngineGradients, over: Tensor, c: Tensor) -> Tensor:
        """c · ⟨ḡ, H⁻¹u⟩ of every candidate, (B, N)."""
        if not self._pairs:
            return torch.zeros_like(c)
        u, margin, _ = self._labelled()
        own, other = self._features(of)
        place = (self._rows[:, None] == over[None]).any(1)
        mean = mean_of(own[place], self._processes)
        weight = fk.logistic_weights(margin)
        if not (u * weight[:, None]).any():  # pairs of replies alike, or a head of zeros: H knows of no direction
            return torch.zeros_like(c)
        curvature = fk.Curvature(u.shape[1], damping=self._config.damping, device=u.device)
        difference = own.double() - other.double()
        with refusals("penalty.damping"):
            curvature.update(u, weight)
            found = fk.exact_steering(curvature, mean, difference, torch.ones_like(difference[:, 0]))
        return c * found.view_as(c).to(c)


def within(values: Tensor, judged: Tensor) -> Tensor:
    """Differences from the mean of each row's judged values, (B, N); 0 where not judged."""
    known = torch.where(judged, values, 0.0)
    mean = known.sum(1, keepdim=True) / judged.sum(1, keepdim=True).clamp_min(1)
    return torch.where(judged, values - mean, 0.0)


def _known(product: Tensor | None) -> Tensor:
    if product is None:
        raise RuntimeError("a product that this penalty needs was not asked for")
    return product
