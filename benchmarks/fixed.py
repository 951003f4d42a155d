"""Replies that never change, and what an iteration has to make of them, in float64 and by closed forms."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpo_train.data.prompts import Prompt

REPLIES = Path(__file__).parent / "replies.jsonl"
Answers = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """B prompts; their candidates, N each, and a reference behind them, as text and as the policy's tokens."""

    prompts: list[Prompt]
    texts: list[list[str]]  # B × (N + 1)
    replies: list[list[list[int]]]


def fixed_replies(prompts: Sequence[Prompt], tokenizer: Any, candidates: int = 3, longest: int = 24) -> Fixed:
    """Real replies of different lengths, `longest` tokens at most; not to these prompts, which is of no matter here."""
    lines = (json.loads(line)["reply"] for line in REPLIES.read_text(encoding="utf-8").splitlines())
    texts, replies = [], []
    for _ in prompts:
        cut = [tokenizer(next(lines), add_special_tokens=False)["input_ids"][:longest] for _ in range(candidates + 1)]
        texts.append([tokenizer.decode(ids).strip() for ids in cut])
        replies.append([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[-1]])
    return Fixed(prompts=list(prompts), texts=texts, replies=replies)


@torch.no_grad()
def exact(fixed: Fixed, lm: Any, classifier: Any, classifier_tokenizer: Any, head: Tensor, gamma: float) -> Answers:
    """What a policy that is still its base makes of the replies, one sequence at a time, in float64.

    Args:
        lm: the base. classifier: the reward model, its last layer `classifier`. head: (H,), of the reward model on
            the base, which reads the last hidden state at the EOS behind a reply. gamma: γ of the raw `relaxed`.

    Returns:
        reward, penalty (B, N) by the classifier, ∇ over its last layer; utility (B, N + 1), without an offset;
        policy_loss and reward_loss (1,), means over the prompts for the best by effective reward; head_reward and
        product (B, N), r and ⟨∇r, u⟩ by the head on the base.
    """
    lm, classifier = copy.deepcopy(lm).double(), copy.deepcopy(classifier).double().eval()
    features: list[Tensor] = []
    hook = classifier.classifier.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0][0]))
    scores, utilities, losses, closing = [], [], [], []
    eos = lm.config.eos_token_id
    for prompt, texts, replies in zip(fixed.prompts, fixed.texts, fixed.replies, strict=True):
        for text, reply in zip(texts, replies, strict=True):
            scores.append(classifier(**classifier_tokenizer(text, return_tensors="pt").to(lm.device)).logits[0, 0])
            ids = torch.tensor([[*prompt.ids, *reply, eos]], device=lm.device)
            hidden = lm.base_model(input_ids=ids).last_hidden_state[0]
            said = lm.lm_head(hidden[:-2]).log_softmax(-1).gather(1, ids[0, 1:-1, None])[:, 0]
            utilities.append(said[-len(reply) :].mean())
            losses.append(-said.mean())
            closing.append(hidden[-1])
    hook.remove()
    shape = len(fixed.prompts), len(fixed.texts[0])
    reward, utility, loss = (torch.stack(x).view(shape) for x in (scores, utilities, losses))
    h, last = (torch.stack(x).view(*shape, -1) for x in (features, closing))  # (B, N + 1, H)
    margin = reward[:, :-1] - reward[:, -1:]
    preference = (utility[:, :-1] - utility[:, -1:]).sigmoid()
    penalty = (margin.sigmoid() - preference) * _products(h)
    best = (reward[:, :-1] - gamma * penalty).argmax(1, keepdim=True)
    p, d = preference.gather(1, best), margin.gather(1, best)
    return {
        "reward": reward[:, :-1],
        "penalty": penalty,
        "utility": utility,
        "policy_loss": loss.gather(1, best).mean()[None],
        "reward_loss": torch.nn.functional.binary_cross_entropy_with_logits(d, p)[None],
        "head_reward": last[:, :-1] @ head.double(),
        "product": _products(last),
    }


def exact_over(module: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str], candidates: int) -> Answers:
    """reward and product ⟨∇r(z), u(z)⟩ (B, N) of a reward model, ∇ over the named weights, formed a row at a time.

    Args:
        batch: B·(N + 1) rows padded on the right, N `candidates` of a prompt and its reference behind them.
    """
    module = copy.deepcopy(module).double().eval().requires_grad_(False)
    named = dict(module.named_parameters())
    chosen = [named[name].requires_grad_(True) for name in names]

    def formed(row: int) -> tuple[Tensor, list[Tensor]]:
        length = int(batch["attention_mask"][row].sum())
        reward = module(**{key: value[row : row + 1, :length] for key, value in batch.items()}).logits[0, 0]
        parts = torch.autograd.grad(reward, chosen, allow_unused=True)
        return reward.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, parts, strict=True)]

    rewards, products = [], []
    for first in range(0, len(batch["input_ids"]), candidates + 1):
        _, other = formed(first + candidates)
        for row in range(first, first + candidates):
            reward, own = formed(row)
            rewards.append(reward)
            products.append(sum(((g * (g - r)).sum() for g, r in zip(own, other, strict=True)), reward.new_zeros(())))
    return {
        name: torch.stack(found).view(-1, candidates) for name, found in (("reward", rewards), ("product", products))
    }


def _products(h: Tensor) -> Tensor:
    """⟨∇r(z), u(z)⟩ (B, N) of a linear head on (B, N + 1, H), the reference last; a bias cancels in u."""
    return (h[:, :-1] * (h[:, :-1] - h[:, -1:])).sum(-1)


def joined(answers: Answers, like: Answers, names: Sequence[str]) -> Tensor:
    """Some answers in one vector, each divided by the norm of what it should be, so that all weigh alike."""
    return torch.cat([answers[name].detach().double().flatten() / like[name].norm() for name in names])
