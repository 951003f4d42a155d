"""One iteration of training, whole: the published procedure against ours, and plain RLHF against FPO.

Every call is iteration number 1 from one start: adapter, reward model, optimizers, replay and random streams are put
back before it. Replies all have the same number of tokens, so that work a prompt is equal whatever is sampled.

What is sampled differs between the procedure and ours, so the gate asks both about fixed replies of different lengths
and compares with float64: what their own code makes of rewards, penalties, utilities and both losses. Of ours on the
policy's base, whose update and retraining are the same code, it asks rewards and products. The first call of each,
which is never timed in a round, answers it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import procedure
from benchmarks.fixed import Answers, exact, fixed_replies, joined
from benchmarks.iterations import Ours, Published
from benchmarks.registry import Case, Competitor, Contest, Headline
from fpo_train.config import (
    DataConfig,
    OracleConfig,
    PenaltyConfig,
    PenaltyKind,
    PolicyConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    UpdateConfig,
)
from fpo_train.data.prompts import read_prompts
from fpo_train.data.sources import load_sequence_classifier
from fpo_train.errors import RunError
from fpo_train.running.run import Workshop

PUBLISHED, SAME = "the paper's procedure", "fpo-train, the same models"
HEADS: dict[str, PenaltyKind] = {
    "fpo-train, own base, none": "none",
    "fpo-train, own base, practical": "practical",
    "fpo-train, own base, residual": "residual",
}
PLAIN, FORESIGHT, RESIDUAL = HEADS
EVERYTHING: dict[str, dict[str, PenaltyKind]] = {
    "whole": {"fpo-train, MiniLM whole, none": "none", "fpo-train, MiniLM whole, practical": "practical"},
    "lora": {"fpo-train, LoRA on the base, none": "none", "fpo-train, LoRA on the base, practical": "practical"},
}
(PLAIN_WHOLE, FORESIGHT_WHOLE), (PLAIN_LORA, FORESIGHT_LORA) = EVERYTHING.values()
CLOSE = 1e-4  # relative, to float64: fp32 through 30 layers, and the differences that penalties are made of
SEED = 0
FIT_PAIRS = 32  # that the head is fitted on, and that `residual` foretells from
ANSWERS: dict[PenaltyKind, Sequence[str]] = {
    "relaxed": ("reward", "penalty", "utility", "policy_loss", "reward_loss"),
    "none": ("head_reward",),
    "practical": ("head_reward", "product"),
    "residual": ("head_reward", "product"),
}
KNOWN = procedure.Settings()  # the published numbers


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Prompts and replies of an iteration.

    Attributes:
        prompts, candidates: how many an iteration, and a prompt; a reference comes on top.
        questions: of the shipped ones, joined to one prompt: eight come close to the 128 tokens of the paper's bound.
        reply_tokens: of every reply. rounds: the most that the procedure and ours with its models are timed in.
        head_rounds: the most that ours on the policy's own base are; None for all, since their ratio is close to 1.
        everything: the penalty is over all weights of a reward model that is trained whole, and over an adapter's on
            the policy's base, each beside plain RLHF with the same reward model; nothing else is run.
    """

    name: str
    prompts: int
    candidates: int
    questions: int
    reply_tokens: int
    rounds: int | None
    head_rounds: int | None = None
    everything: bool = False


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """The paper's four prompts of eight candidates: single questions, and as long as the paper cuts them.

    The third, of short replies, is for the ratio of FPO to plain RLHF: it is close to 1, and generation, the same in
    both, would hide it.
    """
    if quick:
        sizes: dict[str, Any] = {"prompts": 2, "candidates": 2, "reply_tokens": 4, "questions": 1, "rounds": None}
        every = Setting(name="2 prompts, 2+1 of 4, over everything", everything=True, **sizes)
        return [Setting(name="2 prompts, 2+1 of 4", **sizes), every]
    sizes = {"prompts": 4, "candidates": KNOWN.candidates, "reply_tokens": KNOWN.tokens}
    return [
        Setting(name="4 questions, 8+1 of 32", questions=1, rounds=4, head_rounds=4, **sizes),
        Setting(name="4 long prompts, 8+1 of 32", questions=8, rounds=3, head_rounds=3, **sizes),
        Setting(name="4 questions, 8+1 of 8", questions=1, rounds=1, **{**sizes, "reply_tokens": 8}),
        Setting(name="4 questions, 8+1 of 32, over everything", questions=1, rounds=10, everything=True, **sizes),
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """SmolLM2 and MiniLM, the policy shared by all; the procedure has an oracle and a reward model of its own."""
    try:
        return _everything(setting, device) if setting.everything else _build(setting, device)
    except RunError as problem:  # a model that cannot be fetched
        return Contest(competitors={}, expected=dict, cannot=dict.fromkeys(CASE.competitors, str(problem)))


def _build(setting: Setting, device: torch.device) -> Contest:
    shared, texts = configuration(setting), prompts_of(setting)
    workshop = Workshop(shared, texts)
    other = copy.copy(workshop)  # the same policy; but what the head on its base is fitted to is not the classifier's
    if workshop.processes.device.type != device.type:
        raise RunError(f"fpo_train runs on {workshop.processes.device.type} here, not on {device.type}")
    prompts = workshop.prompts.batch(0, setting.prompts)  # those of iteration 1, in its order
    fixed = fixed_replies(prompts[:2], workshop.policy.tokenizer)
    models = procedure_models(workshop)
    sizes = {"candidates": setting.candidates, "tokens": setting.reply_tokens}
    peer = procedure.Procedure(models, dataclasses.replace(KNOWN, **sizes))
    heads: dict[str, Ours] = {}

    @functools.cache
    def truth() -> Answers:
        head = heads[PLAIN].parts.reward_model.head.weight[0]
        return exact(fixed, models.oracle, models.reward_model, models.reward_tokenizer, head, KNOWN.gamma)

    def whole(one: Ours | Published) -> Tensor:
        return joined(one.judged(fixed), truth(), ANSWERS["relaxed"])

    def products(one: Ours) -> Tensor:
        judged = one.judged(fixed)
        return joined({**judged, "head_reward": judged["reward"]}, truth(), ANSWERS[one.parts.config.penalty.kind])

    for name, kind in HEADS.items():
        heads[name] = Ours(own_base(setting, kind), other, products)
    turns: dict[str, Ours | Published] = {
        PUBLISHED: Published(peer, [prompt.text for prompt in prompts], whole),
        SAME: Ours(shared, workshop, whole),
        **heads,
    }
    return Contest(
        competitors={
            name: Competitor(
                run=turn,
                budget=CLOSE,
                answers=HEADS.get(name, "relaxed"),
                rounds=setting.head_rounds if name in HEADS else setting.rounds,
                figures=functools.partial(phases, turn),
            )
            for name, turn in turns.items()
        },
        expected=lambda: {kind: joined(truth(), truth(), names) for kind, names in ANSWERS.items()},
        cannot=dict.fromkeys((*EVERYTHING["whole"], *EVERYTHING["lora"]), "measured in the setting over everything"),
    )


def _everything(setting: Setting, device: torch.device) -> Contest:
    """FPO over all weights of a classifier, and over an adapter's on the policy's base, each beside plain RLHF."""
    workshop = Workshop(over_everything(setting, "whole", "none"), prompts_of(setting))
    if workshop.processes.device.type != device.type:
        raise RunError(f"fpo_train runs on {workshop.processes.device.type} here, not on {device.type}")
    fixed = fixed_replies(workshop.prompts.batch(0, setting.prompts)[:2], workshop.policy.tokenizer)
    plain: dict[str, Ours] = {}

    @functools.cache
    def truth(scope: str) -> Answers:
        return plain[scope].exact(fixed, "all" if scope == "whole" else "lora")

    def answer(scope: str, one: Ours) -> Tensor:
        judged = {name: value for name, value in one.judged(fixed).items() if name in truth(scope)}
        return joined(judged, truth(scope), list(judged))

    turns: dict[str, Ours] = {}
    expected: dict[str, Callable[[], Tensor]] = {}
    for scope, names in EVERYTHING.items():
        for name, kind in names.items():
            config, beside = over_everything(setting, scope, kind), plain.get(scope)
            own = copy.copy(workshop)  # each reward model's head is fitted to what that model reads
            turns[name] = Ours(config, own, functools.partial(answer, scope), beside)
            plain.setdefault(scope, turns[name])
            wanted = ["reward"] if kind == "none" else ["reward", "product"]
            expected[name] = functools.partial(lambda of, these: joined(truth(of), truth(of), these), scope, wanted)
    return Contest(
        competitors={
            name: Competitor(
                run=turn, budget=CLOSE, answers=name, rounds=setting.rounds, figures=functools.partial(phases, turn)
            )
            for name, turn in turns.items()
        },
        expected=lambda: {name: wanted() for name, wanted in expected.items()},
        cannot=dict.fromkeys((PUBLISHED, SAME, *HEADS), "measured in the other settings"),
    )


def prompts_of(setting: Setting) -> list[tuple[str, str]]:
    """(id, text) of the prompts, from the first of the shipped questions."""
    texts, each = [str(asked) for _, asked in read_prompts("questions")], setting.questions
    return [(f"prompt-{n}", " ".join(texts[n * each : (n + 1) * each])) for n in range(setting.prompts)]


def configuration(setting: Setting) -> RunConfig:
    """The paper's experiment on these models, as it should be: what the procedure does, by fpo_train."""
    return RunConfig(
        seed=SEED,
        policy=PolicyConfig(),
        reward_model=RewardModelConfig(
            kind="classifier",
            model="minilm",
            input="reply",
            max_tokens=KNOWN.longest,
            fit_pairs=0,
            learning_rate=KNOWN.reward_rate,
        ),
        oracle=OracleConfig(offset=KNOWN.offset, utility_range=(KNOWN.lowest, KNOWN.highest)),
        data=DataConfig(max_tokens=KNOWN.longest),
        rollout=rollout(setting),
        penalty=PenaltyConfig(kind="relaxed", gamma=KNOWN.gamma, gamma_units="raw"),
        update=UpdateConfig(
            loss_on="prompt_and_reply", mean="prompt", max_grad_norm=0.0, learning_rate=KNOWN.policy_rate
        ),
    )


def own_base(setting: Setting, kind: PenaltyKind) -> RunConfig:
    """The defaults: a score head on the policy's own base."""
    return RunConfig(
        seed=SEED,
        reward_model=RewardModelConfig(fit_pairs=FIT_PAIRS),
        rollout=rollout(setting),
        penalty=PenaltyConfig(kind=kind),
    )


def over_everything(setting: Setting, scope: str, kind: PenaltyKind) -> RunConfig:
    """A classifier that is trained whole, or an adapter on the policy's own base, and the penalty over all of that."""
    model = RewardModelConfig(kind="lora", fit_pairs=FIT_PAIRS)
    if scope == "whole":
        reads: dict[str, Any] = {"model": "minilm", "input": "reply", "max_tokens": KNOWN.longest}
        model = RewardModelConfig(kind="classifier", train="all", fit_pairs=FIT_PAIRS, **reads)
    parameters = "all" if scope == "whole" else "lora"
    penalty = PenaltyConfig(kind=kind, parameters=parameters)
    return RunConfig(seed=SEED, reward_model=model, rollout=rollout(setting), penalty=penalty)


def rollout(setting: Setting) -> RolloutConfig:
    """Replies of one length."""
    tokens = setting.reply_tokens
    return RolloutConfig(
        prompts=setting.prompts,
        candidates=setting.candidates,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        temperature=KNOWN.temperature,
        top_p=KNOWN.top_p,
        top_k=KNOWN.top_k,
    )


def procedure_models(workshop: Workshop) -> procedure.Models:
    """The policy of a workshop, adapter included; an oracle and a reward model of the procedure's own."""
    policy = workshop.policy
    oracle = copy.deepcopy(policy.model).unload()
    classifier, tokenizer, _ = load_sequence_classifier(RewardModelConfig().classifier, torch.float32)
    classifier.requires_grad_(False).classifier.requires_grad_(True)
    return procedure.Models(
        policy=policy.model,
        oracle=oracle.eval().requires_grad_(False),
        tokenizer=policy.tokenizer,
        reward_model=classifier.to(policy.device).eval(),
        reward_tokenizer=tokenizer,
    )


def phases(turn: Ours | Published) -> Mapping[str, float]:
    """Median seconds of each phase; without the first call, which warms up, where there are others."""
    later = turn.seconds[1:] or turn.seconds
    return {phase: statistics.median(seconds[phase] for seconds in later) for phase in procedure.PHASES}


def chart(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: seconds by phase."""
    lines = [f"| setting | | {' | '.join(procedure.PHASES)} | whole |", f"|---|---|{'---|' * 5}"]
    for row in rows:
        if "figures" in row:
            cells = [row["figures"][phase] for phase in procedure.PHASES] + [row["seconds"]["median"]]
            seconds = " | ".join(f"{cell:.2f}" for cell in cells)
            lines.append(f"| {row['setting']['name']} | {row['competitor']} | {seconds} |")
    return lines


CASE = Case(
    name="train_step",
    description="one iteration of training: the published procedure against ours, plain RLHF against FPO, in seconds",
    competitors=(PUBLISHED, SAME, *HEADS, *EVERYTHING["whole"], *EVERYTHING["lora"]),
    baseline=SAME,
    settings=settings,
    build=build,
    headlines=(
        Headline(text="the paper's procedure / ours, the same models", over=PUBLISHED, under=SAME),
        Headline(text="FPO head-only (practical) / plain RLHF", over=FORESIGHT, under=PLAIN),
        Headline(text="FPO head-only (residual) / plain RLHF", over=RESIDUAL, under=PLAIN),
        Headline(text="FPO over all weights of MiniLM / plain RLHF", over=FORESIGHT_WHOLE, under=PLAIN_WHOLE),
        Headline(text="FPO over a LoRA reward model / plain RLHF", over=FORESIGHT_LORA, under=PLAIN_LORA),
    ),
    summary=lambda rows: "\n".join(chart(rows)),
)
