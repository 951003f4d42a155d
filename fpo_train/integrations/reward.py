"""The reward of FPO as an object: score, penalise, label, retrain; for any trainer that calls a function on texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fpo_train.config import PenaltyConfig, PenaltyKind, RewardModelConfig
from fpo_train.config.seeds import mix
from fpo_train.errors import RunError
from fpo_train.oracle import Labels, Oracle
from fpo_train.oracle.base import Unasked, UtilityOracle
from fpo_train.penalty.base import Judged
from fpo_train.penalty.gradients import asking
from fpo_train.processes import Ranks
from fpo_train.reward_model import RewardModel
from fpo_train.reward_model.replay import Replay
from fpo_train.rollout import NotRead

from . import groups, made
from .groups import Grouped, InGroups, Judgement, Scored, judgement, numbers
from .made import OnBase, Train
from .texts import Reference, at_rest, grouped, labelled, reply_in, talk_in

UNTRAINED = 8  # calls by a trainer after which an untrained reward model is spoken of


class FPOReward:
    """r(z) − γ · penalty(z) of completions, from a reward model that it can also train.

        reward = FPOReward(reward_model, tokenizer, oracle=score)       # a TRL reward function
        trainer = GRPOTrainer(…, reward_funcs=reward, callbacks=[FPOCallback(reward)])

    Called as TRL calls reward functions, it returns a number a completion, or None where one cannot be scored. Reward
    and penalty are one number because trainers that normalise each function's rewards would lose γ; the two parts go to
    TRL's `log_metric` and `log_extra` as `fpo/reward` and `fpo/penalty`. Completions of one prompt are a group,
    wherever they stand and over all processes: the groups' spreads give γ its unit. Differences within a group are
    what the number means; its level is as large as the penalty's. Where there is an oracle, each group's best
    completion and its reference become a labelled pair, and `update` trains the reward model on the pairs since the
    last update. What a trainer scores while its model is in eval mode is neither labelled nor counted, once
    `watch` has been told of the model (as `FPOCallback` does).

    It is no nn.Module: trainers would run one themselves, without gradients. Results are the same on all processes
    that torch.distributed joins, which must call it together; each has a whole copy of the reward model.

    Args:
        reward_model: a sequence classifier with one output (a module, also one that PEFT has wrapped), its folder or
            hub id; or `OnBase(model)`: on the trainer's own. Of its weights only those that are trained require
            gradients from then on (of `OnBase` none), and it is in eval mode while it reads and learns.
        tokenizer: the reward model's; None: that of the folder or hub id.
        penalty: `none`, `practical`, `relaxed`, `tracin`, `exact`, `residual`; or a PenaltyConfig, which has all that
            follows up to `parameters` and more.
        gamma, gamma_units: γ, "raw" as in the paper, or in units of the reward's spread ("reward_std").
        parameters: weights that ∇ is over: `head`, `lora`, `all`, or comma-separated names and globs.
        oracle: says what a completion is worth: a function as TRL's reward functions are, oracle(prompts,
            completions, **columns) → a number each, or None; or an Oracle of this package that reads texts. None:
            nothing is labelled, so that the reward model cannot be trained, and the penalties that need labels cannot
            be had.
        reference: what each completion is compared with: the name of a data set's column; "group": another completion
            of the same prompt; or a function of the prompts, such as `BaseReplies`.
        train: weights that `update` trains: `head`, `lora` or `all`; None: those of `parameters`.
        settings: how it is trained (learning_rate, steps, optimizer, buffer, replay_pairs, …) and what it reads
            (`max_tokens`; `input` "pair" or "reply"; "chat", the default, means messages by the tokenizer's chat
            template, and a text prompt with the completion right behind it, as trainers do).
        rows_at_once: sequences on a tape; 0: a call's all. seed: of sketches and of what is drawn. name: by which a
            trainer logs it and keeps its state; two rewards of one trainer need two.

    Raises:
        RunError: a model that cannot be loaded or is no reward model, a penalty without the oracle that it needs, or
            weights that it does not have.
    """

    def __init__(
        self,
        reward_model: str | nn.Module | OnBase,
        tokenizer: Any = None,
        penalty: PenaltyKind | PenaltyConfig = "practical",
        gamma: float = 1.0,
        gamma_units: str = "reward_std",
        parameters: str = "head",
        oracle: Callable[..., Sequence[Any]] | Oracle | None = None,
        reference: Reference = "reference",
        *,
        train: Train | None = None,
        settings: RewardModelConfig | None = None,
        oracle_temperature: float = 1.0,
        rows_at_once: int = 0,
        seed: int = 0,
        name: str = "fpo",
    ) -> None:
        self.__name__ = name  # by which trainers log a function
        if not callable(reference) and not isinstance(reference, str):
            wanted = "a column's name, 'group' or a function of the prompts"
            raise RunError(f"reference: wanted {wanted}, got {reference!r:.80}")
        config = made.run_config(penalty, gamma, gamma_units, parameters, train, settings, reward_model, seed)
        if oracle is None and config.penalty.labels_all:
            wanted = "it asks an oracle about every completion; wanted oracle=…, got None"
            raise RunError(f"penalty {config.penalty.kind}: {wanted}")
        self.config, self.ranks = config, Ranks()
        self.model: RewardModel = made.reward_model(reward_model, tokenizer, config, self.ranks)
        self.model.names(config.penalty.parameters)  # refused here, not at the first batch
        self.reference = reference
        self._oracle = made.oracle(oracle, oracle_temperature)
        self._penalty = InGroups(config.penalty, self.ranks, seed)
        plain = replace(config.penalty, kind="tracin", gamma=1.0, gamma_units="raw", checkpoints=1)
        self._steering = InGroups(plain, self.ranks, seed)
        self._replay = Replay(config.reward_model.buffer)
        self._rows_at_once = rows_at_once
        self._calls = self._updates = self._updated = 0  # of the calls that counted, the number of the last update's
        self._loss: float | None = None  # of the last update
        self._fresh = isinstance(reward_model, str) and not self.model.comes_trained
        self._learning: Callable[[], bool] = lambda: True
        self._normalised = self._checked = self._watched = False
        self._said: set[str] = set()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """r(z) − γ · penalty(z) of each completion; None where one cannot be scored, and why is said once.

        Args:
            prompts: texts or lists of messages, one a completion. completions: texts, or lists of one message.
            log_metric, log_extra: TRL's. columns: of the data set, a value a completion.

        Raises:
            RunError: no such column, an oracle that fails, a text that the reward model cannot read.
        """
        learns = self._learning()
        with at_rest(self.model.module):
            said, labels, judged = self._judge(prompts, completions, columns, learns)
            scored = self._gathered(said, judged)
            if learns:
                self._calls += 1
                self._collect(said, labels, scored)
        for sentence in groups.lost(scored, self.config.penalty, self._normalised):
            self._say(sentence)
        self._warn_of_learning(said, scored, logged=log_metric is not None)
        found = judgement(judged)
        if log_extra is not None:
            for name, values in (("reward", found.reward), ("penalty", found.penalty)):
                log_extra(f"{self.__name__}/{name}", numbers(values))
        if log_metric is not None:
            for name, value in self._metrics(scored, judged.spread).items():
                log_metric(f"{self.__name__}/{name}", value)
        return numbers(found.effective)

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Judgement:
        """What completions are worth at the weights as they are: as by a call, but nothing is counted or kept.

        γ's running scale is taken as it stands (before the first call: that of these completions).
        """
        with at_rest(self.model.module):
            return judgement(self._judge(prompts, completions, columns, learn=False)[2])

    def steering(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """c(z) · ⟨ḡ, u(z)⟩ of completions in the paper's units, (n,) on the CPU; ḡ their mean ∇r. NaN: not scorable.

        Training the reward model by a small step η on all of them changes their mean reward by −η times the mean of
        this, to first order. Nothing is counted, whatever the penalty in use.

        Raises:
            RunError: there is no oracle to say c.
        """
        self._oracle_for("steering")
        with at_rest(self.model.module):
            return judgement(self._judge(prompts, completions, columns, False, self._steering)[2]).penalty

    def utility(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """U(z) by the oracle, (n,) fp32 on the CPU; NaN where it cannot say.

        Raises:
            RunError: there is no oracle that gives a completion alone a number.
        """
        asked = self._oracle_for("utility")
        if not isinstance(asked, UtilityOracle):
            raise RunError("utility: the oracle says which of two is better, and no number of one alone")
        said, _ = grouped(prompts, completions, columns, lambda some: [""] * len(some), self.ranks, self.model.device)
        return asked.utility(said, NotRead(), torch.arange(len(said.texts)))[said.rows.cpu()].cpu()

    def _oracle_for(self, what: str) -> Oracle:
        if self._oracle is None:
            raise RunError(f"{what}: the reward has no oracle; wanted FPOReward(…, oracle=…)")
        return self._oracle

    def fit(
        self,
        prompts: Sequence[Any],
        chosen: Sequence[Any],
        rejected: Sequence[Any],
        preferences: Sequence[float] | None = None,
    ) -> None:
        """Set the score head by logistic regression on preference pairs, which are kept for later updates' replay.

        A reward model whose files hold no score head, or a fresh one on a trainer's base, begins so. Every process
        must call it with the same pairs.

        Args:
            prompts, chosen, rejected: texts or messages, one a pair. preferences: p* of `chosen`; None: 1 each.

        Raises:
            RunError: a pair that is none, with its number.
        """
        soft = [1.0] * len(prompts) if preferences is None else list(preferences)
        if not len(prompts) == len(chosen) == len(rejected) == len(soft) or not len(prompts):
            sizes = f"{len(prompts)}, {len(chosen)}, {len(rejected)} and {len(soft)}"
            raise RunError(f"fit: wanted as many prompts, chosen and rejected replies and preferences, got {sizes}")
        pairs = []
        for n, (prompt, good, bad, p) in enumerate(zip(prompts, chosen, rejected, soft, strict=True)):
            if not 0 <= p <= 1:
                raise RunError(f"fit: pair {n}: preference: wanted a number from 0 to 1, got {p!r}")
            talk, where = talk_in(prompt, f"fit: pair {n}"), f"fit: pair {n}"
            pairs.append(labelled(talk, reply_in(good, where), reply_in(bad, where), float(p), 0))
        with at_rest(self.model.module):
            self.model.check([(pair.prompt.talk, pair.chosen_text) for pair in pairs])
            self.model.fit(pairs, self._rows_at_once)
        self._replay.add(pairs)
        self._fresh = False

    def update(self) -> float | None:
        """Train the reward model on the pairs since its last training, and on kept ones; mean loss in nats a pair.

        None where no pair has come since the last training. Every process must call it.

        Raises:
            NotFinite: a gradient or weights that are not finite.
        """
        settings, losses = self.config.reward_model, []
        fresh = self._replay.since(self._updated)
        if not fresh:
            return None
        generator = torch.Generator().manual_seed(mix("replay", self.config.seed, self._updates))
        with torch.enable_grad(), at_rest(self.model.module), asking(list(self.model.trainable.values())):
            for _ in range(settings.steps):
                batch = fresh + self._replay.draw(settings.replay_pairs, generator, self._updated)
                losses.append(float(self.model.gradient(batch, self._rows_at_once)))
                self.model.step()
        self._updates, self._updated = self._updates + 1, self._calls
        self._loss = sum(losses) / len(losses)
        return self._loss

    def watch(self, model: nn.Module, normalised: bool = False) -> None:
        """Count and label only what is scored while `model`, the trainer's, is in train mode.

        `normalised`: advantages are divided by their spread; where γ is lost in that, it is said once.
        """
        self._learning, self._normalised, self._watched = (lambda: model.training), normalised, True

    @property
    def pairs(self) -> int:
        """Labelled pairs that are kept."""
        return len(self._replay)

    @property
    def trains(self) -> bool:
        """Whether there is an oracle to learn from."""
        return self._oracle is not None

    @property
    def by_row(self) -> bool:
        """Whether `score` says the same of a completion whatever else it is asked about in the call.

        Not so where the penalty takes a mean over the call, nor where γ's scale is still that of the call itself.
        """
        penalty = self.config.penalty
        scaled = penalty.gamma_units == "raw" or self._penalty.state()["penalty_variance"] > 0
        return penalty.kind == "none" or (penalty.kind in ("practical", "relaxed", "residual") and scaled)

    def state_dict(self) -> dict[str, Any]:
        """All that calls and updates change; tensors, numbers, texts and lists of them (torch.load's weights_only)."""
        return {
            "reward_model": self.model.state_dict(),
            "replay": self._replay.state_dict(),
            "penalty": self._penalty.state(),
            "oracle": None if self._oracle is None else self._oracle.state_dict(),
            "reference": getattr(self.reference, "state_dict", dict)(),
            "penalty_kind": self.config.penalty.kind,
            "counts": {"calls": self._calls, "updates": self._updates, "updated": self._updated, "loss": self._loss},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, bit for bit.

        Raises:
            RunError: the state of another reward.
        """
        try:
            self._refuse_other(state)
            self.model.load_state_dict(state["reward_model"])
            self._replay.load_state_dict(state["replay"])
            self._penalty.restore(state["penalty"])
            if self._oracle is not None and state["oracle"] is not None and self.ranks.main:
                self._oracle.load_state_dict(state["oracle"])
            if state["reference"]:
                self.reference.load_state_dict(state["reference"])  # type: ignore[union-attr]
            self._fresh, counts = False, state["counts"]
            self._calls, self._updates, self._updated = counts["calls"], counts["updates"], counts["updated"]
            self._loss = counts["loss"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            lacks = "it has no " if isinstance(error, KeyError) else ""
            raise RunError(f"state: it does not fit this reward: {lacks}{error}") from error

    def _refuse_other(self, state: dict[str, Any]) -> None:
        """Before anything is changed: see that a state is this reward's. Raises: ValueError: it is not."""
        kind, shapes = self.config.penalty.kind, {n: p.shape for n, p in self.model.trainable.items()}
        if state["penalty_kind"] != kind:
            raise ValueError(f"it is of the penalty {state['penalty_kind']}, this reward's is {kind}")
        if {name: weight.shape for name, weight in state["reward_model"]["weights"].items()} != shapes:
            raise ValueError(f"its reward model trains other weights than the {len(shapes)} of this one")

    def _judge(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        learn: bool,
        penalty: InGroups | None = None,
    ) -> tuple[Grouped, Labels, Judged]:
        if self._fresh:
            told = "its files hold no score head; fit(prompts, chosen, rejected) sets one"
            raise RunError(f"reward_model {self.config.reward_model.model}: {told}")
        if not self.model.head.weight.any():
            self._say("every reward is 0: the score head is all zeros; fit(prompts, chosen, rejected) begins it")
        matters = self._oracle.takes if isinstance(self._oracle, made.CalledOracle) else lambda column: False
        where = self.reference, self.ranks, self.model.device, matters
        said, complaints = grouped(prompts, completions, columns, *where)
        for complaint in complaints:
            self._say(f"cannot be scored: {complaint}")
        if not self._checked:
            self.model.check([(said.talk(row), text) for row, text in enumerate(said.texts)])
            self._checked = True
        readings = NotRead(self._rows_at_once)
        labels = Labels(self._oracle or Unasked(), said, readings)
        reading = self.model.read(said, readings, self._rows_at_once)
        judged = (penalty or self._penalty)(self.model, reading, labels, self._replay, said, self._rows_at_once, learn)
        return said, labels, judged

    def _metrics(self, scored: list[Scored], spread: float) -> dict[str, float]:
        """What is logged, over all processes and so the same on each: some trainers want one list of names."""
        found = {"penalty_to_reward_std": spread, "pairs": float(len(self._replay))}
        if self._loss is not None:
            found["reward_model_loss"] = self._loss
        if known := [one for one in scored if one.effective > float("-inf")]:
            found["reward"] = sum(one.reward for one in known) / len(known)
            found["penalty"] = sum(one.penalty for one in known) / len(known)
        return found

    def _gathered(self, said: Grouped, judged: Judged) -> list[Scored]:
        """All processes' completions, in rank order."""
        columns = (one.flatten().tolist() for one in (judged.reward, judged.penalty, judged.effective))
        return self.ranks.gather_objects([Scored(*one) for one in zip(said.groups, *columns, strict=True)])

    def _collect(self, said: Grouped, labels: Labels, scored: list[Scored]) -> None:
        """Keep each group's best completion and its reference as a labelled pair, the same ones on all processes."""
        if self._oracle is None:
            return
        mine = len(said.rows)
        first = sum(self.ranks.gather_objects([mine])[: self.ranks.rank])
        best = [place - first for place in groups.best(scored) if first <= place < first + mine]
        wanted = torch.zeros_like(said.usable)
        wanted[best] = True
        preferences = labels.preferences(wanted)[:, 0].tolist()
        labels.check(self.ranks)
        if best and all(preferences[place] != preferences[place] for place in best):
            self._say("the oracle could say nothing of a whole call: no pair was labelled")
        pairs = []
        for place in best:
            if preferences[place] != preferences[place]:
                continue
            row, reference = int(said.rows[place]), int(said.references[place])
            texts = said.texts[row], said.texts[reference]
            pairs.append(labelled(said.talk(row), *texts, preferences[place], self._calls))
        self._replay.add(self.ranks.gather_objects(pairs))

    def _warn_of_learning(self, said: Grouped, scored: list[Scored], logged: bool) -> None:
        """`logged`: the caller is a trainer as TRL's are."""
        if self._oracle is None or not self._learning():
            return
        if not groups.best(scored) and said.usable.any():
            self._say("nothing of a whole call could be scored: the oracle could say nothing of it")
        if logged and not self._watched and not self._updates and self._calls >= UNTRAINED:
            told = "there is an oracle; callbacks=[FPOCallback(reward)] trains it, with this very reward"
            self._say(f"the reward model has not been trained in {self._calls} calls: {told}")

    def _say(self, sentence: str) -> None:
        kind = sentence[:40]
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"fpo: {sentence}", stacklevel=4)
