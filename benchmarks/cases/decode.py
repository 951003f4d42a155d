"""Replies of a language model token by token: ours against transformers' own generation, and the matrix products alone.

Sampled replies differ from one sampler to the next, so the gate asks each for its likeliest replies and compares how
likely those are, by one plain forward of the whole rows. Every reply has the same number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import Case, Competitor, Contest, Headline
from fpo_train.config import DataConfig, PolicyConfig, RolloutConfig
from fpo_train.data.prompts import Prompt, read_prompts, render_prompts
from fpo_train.errors import RunError
from fpo_train.policy import Policy, load_policy, prefix
from fpo_train.policy.decoding import GROUPED
from fpo_train.rollout import sampler

OURS, THEIRS = "fpo-train", "transformers, the cache that grows"
STATIC, FLOOR = "transformers, a static cache", "the matrix products alone"
CLOSE = 1e-3  # of log-likelihoods: among likeliest tokens that tie, rounding chooses


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Rows that are decoded together.

    Attributes:
        prompts, candidates: how many replies each; every prompt has one more, which in ours is the base's.
        tokens: of every reply.
    """

    name: str
    prompts: int
    candidates: int
    tokens: int


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """The paper's four prompts of eight candidates and a reference; and one prompt's alone."""
    if quick:
        return [Setting(name="2 questions, 2+1 of 4", prompts=2, candidates=2, tokens=4)]
    return [
        Setting(name="4 questions, 8+1 of 32", prompts=4, candidates=8, tokens=32),
        Setting(name="1 question, 8+1 of 32", prompts=1, candidates=8, tokens=32),
    ]


class Turn:
    """One way to the replies: `say(greedy)` gives tokens (R, tokens); a call gives how likely the likeliest are."""

    def __init__(self, say: Callable[[bool], Tensor], likely: Callable[[Tensor], Tensor]) -> None:
        self._say = say
        self._answer: Callable[[], Tensor] = functools.cache(lambda: likely(say(True)))

    def __call__(self) -> Tensor:
        answer = self._answer()
        self._say(False)
        return answer


def build(setting: Setting, device: torch.device) -> Contest:
    """SmolLM2 with a fresh adapter, which says what the base says: all rows can be compared."""
    try:
        policy = load_policy(PolicyConfig(), 0, device)
    except RunError as problem:  # a model that cannot be fetched
        return Contest(competitors={}, expected=dict, cannot=dict.fromkeys(CASE.competitors, str(problem)))
    texts = read_prompts("questions")[: setting.prompts]
    config = RolloutConfig(
        prompts=setting.prompts,
        candidates=setting.candidates,
        max_new_tokens=setting.tokens,
        min_new_tokens=setting.tokens,
    )
    prompts = list(render_prompts(texts, 0, policy.tokenizer, 256, DataConfig()))

    def ours(greedy: bool) -> Tensor:
        how = dataclasses.replace(config, top_k=1) if greedy else config
        return torch.tensor(sampler(policy, how, 0)(prompts, 1, 0).replies)

    likely = functools.partial(likelihoods, policy, prompts, setting)
    ways: dict[str, Callable[[bool], Tensor]] = {
        OURS: ours,
        THEIRS: functools.partial(by_transformers, policy, prompts, config, None),
        STATIC: functools.partial(by_transformers, policy, prompts, config, "static"),
    }
    turns: dict[str, Callable[[], Tensor]] = {name: Turn(way, likely) for name, way in ways.items()}
    expected = functools.cache(lambda: likely(plainly(policy, prompts, setting)))
    products = matrix_products(policy, setting.prompts * (setting.candidates + 1), setting.tokens)
    turns[FLOOR] = lambda: products() or expected()
    return Contest(
        competitors={name: Competitor(run=turn, budget=CLOSE, answers="likely") for name, turn in turns.items()},
        expected=lambda: {"likely": expected()},
    )


def by_transformers(
    policy: Policy, prompts: list[Prompt], config: RolloutConfig, cache: str | None, greedy: bool
) -> Tensor:
    """All rows by the policy, in one call of its `generate`, with its own attention."""
    told = prefix.read(policy, prompts)  # for the padded rows alone
    policy.lm.set_attn_implementation("sdpa")
    more: dict[str, Any] = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    if not greedy:
        more |= {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    try:
        out = policy.model.generate(
            input_ids=told.ids.repeat_interleave(config.candidates + 1, 0),
            attention_mask=told.mask.repeat_interleave(config.candidates + 1, 0),
            do_sample=not greedy,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            eos_token_id=list(policy.ends),
            pad_token_id=policy.eos,
            repetition_penalty=1.0,
            **more,
        )
    finally:
        policy.lm.set_attn_implementation(GROUPED)
    return out[:, told.ids.shape[1] :]


@torch.no_grad()
def plainly(policy: Policy, prompts: list[Prompt], setting: Setting) -> Tensor:
    """The likeliest replies by whole forwards of one row, without any cache."""
    ends, rows = torch.tensor(policy.ends), []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(setting.tokens):
            logits = policy.lm(input_ids=torch.tensor([ids], device=policy.device), use_cache=False).logits[0, -1]
            ids.append(int(logits.index_fill(0, ends.to(logits.device), -torch.inf).argmax()))
        rows += [ids[len(prompt.ids) :]] * (setting.candidates + 1)
    return torch.tensor(rows)


@torch.no_grad()
def likelihoods(policy: Policy, prompts: list[Prompt], setting: Setting, replies: Tensor) -> Tensor:
    """Mean log-likelihood of each reply, (R,), by one plain forward a row."""
    found = []
    for row, reply in enumerate(replies.tolist()):
        ids = torch.tensor([[*prompts[row // (setting.candidates + 1)].ids, *reply]], device=policy.device)
        logits = policy.lm(input_ids=ids, use_cache=False).logits[0, -len(reply) - 1 : -1].double()
        found.append(logits.log_softmax(-1).gather(1, ids[0, -len(reply) :, None]).mean())
    return torch.stack(found)


def matrix_products(policy: Policy, rows: int, tokens: int) -> Callable[[], None]:
    """Every linear layer of the base on as many rows, as often as tokens are said: what no decoding does without."""
    lm = policy.lm
    linear = [m for name, m in lm.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    inputs = {
        m.in_features: torch.randn(rows, m.in_features, device=policy.device, dtype=m.weight.dtype) for m in linear
    }

    @torch.no_grad()
    def run() -> None:
        for _ in range(tokens):
            for m in linear:
                nn.functional.linear(inputs[m.in_features], m.weight)

    return run


CASE = Case(
    name="decode",
    description="sampled replies of SmolLM2: ours against transformers' generate, and the matrix products alone",
    competitors=(OURS, THEIRS, STATIC, FLOOR),
    baseline=THEIRS,
    settings=settings,
    build=build,
    headlines=(
        Headline(text="ours / transformers' generate", over=OURS, under=THEIRS),
        Headline(text="ours / transformers' generate, static cache", over=OURS, under=STATIC),
        Headline(text="ours / the matrix products alone", over=OURS, under=FLOOR),
    ),
)
