"""The published procedure, stated plainly: one prompt at a time, one autograd call a candidate, all text encoded anew.

What Gauthier, Bach and Jordan 2026 (arXiv 2605.04266) describe of their experiment, with transformers and autograd
alone. Where the description leaves a choice, the cheaper one is taken: a prompt's candidates are generated in one call,
its reference is scored once for all of them, and the labels of the penalty serve the reward model too. What would
change the answers is put right: attention masks, no second BOS, nothing of a reply's length in padding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

PHASES = ("generate", "score", "update", "retrain")


@dataclass(frozen=True, kw_only=True)
class Models:
    """Three models, each with its own weights.

    Attributes:
        policy: a causal language model, its adapter alone requiring grad. oracle: the same without an adapter.
        tokenizer: of both. reward_model: a sequence classifier, its `classifier` alone requiring grad.
    """

    policy: Any
    oracle: Any
    tokenizer: Any
    reward_model: Any
    reward_tokenizer: Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The published numbers; replies are of one length here, so that work a prompt is equal.

    Attributes:
        candidates: N. tokens: of each reply. longest: prompts and the reward model's inputs are cut there.
        gamma: γ. offset, lowest, highest: U = offset + mean log-likelihood in nats a token, cut to that range.
    """

    candidates: int = 8
    tokens: int = 32
    longest: int = 128
    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 50
    gamma: float = 10.0
    offset: float = 5.0
    lowest: float = -15.0
    highest: float = 5.0
    policy_rate: float = 2e-5
    reward_rate: float = 5e-5
    weight_decay: float = 0.01


class Judged(NamedTuple):
    """A prompt's candidates: reward, penalty and preference p* (N,), and utility (N + 1,), the reference's last."""

    reward: Tensor
    penalty: Tensor
    preference: Tensor
    utility: Tensor


class Procedure:
    """The procedure with the penalty `relaxed`, c(z)·⟨∇r(z), ∇r(z) − ∇r(ref)⟩, over the reward model's classifier."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings = models, settings
        self._adapter = [p for p in models.policy.parameters() if p.requires_grad]
        self._head = [p for p in models.reward_model.parameters() if p.requires_grad]
        self._seconds: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """New optimizers."""
        decay = self.settings.weight_decay
        self._policy_step = torch.optim.AdamW(self._adapter, lr=self.settings.policy_rate, weight_decay=decay)
        self._reward_step = torch.optim.AdamW(self._head, lr=self.settings.reward_rate, weight_decay=decay)

    def iterate(self, prompts: Sequence[str], seed: int) -> dict[str, float]:
        """The prompts in turn, then one step of the policy and one of the reward model; seconds by phase."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        torch.manual_seed(seed)
        for prompt in prompts:
            with self._clock("generate"):
                replies = self.sample(self.models.policy, prompt, self.settings.candidates)
                (reference,) = self.sample(self.models.oracle, prompt, 1)
            with self._clock("score"):
                judged = self.judge(prompt, replies, reference)
                best = int((judged.reward - self.settings.gamma * judged.penalty).argmax())
            with self._clock("update"):
                self.learn(prompt, replies[best], 1 / len(prompts))
            with self._clock("retrain"):
                self.retrain(replies[best], reference, judged.preference[best], 1 / len(prompts))
        with self._clock("update"):
            self._policy_step.step()
            self._policy_step.zero_grad()
        with self._clock("retrain"):
            self._reward_step.step()
            self._reward_step.zero_grad()
        return self._seconds

    def rendered(self, prompt: str) -> str:
        """The prompt as a chat up to where the reply begins, as text, cut on the right."""
        turns = [{"role": "user", "content": prompt}]
        text: str = self.models.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = self.models.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= self.settings.longest:
            return text
        return str(self.models.tokenizer.decode(ids[: self.settings.longest]))

    @torch.no_grad()
    def sample(self, model: Any, prompt: str, count: int) -> list[str]:
        """`count` replies of a model, as text."""
        settings, tokenizer = self.settings, self.models.tokenizer
        inputs = self._encode(self.rendered(prompt))
        model.eval()
        out = model.generate(
            **inputs,
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            repetition_penalty=1.0,
            num_return_sequences=count,
            min_new_tokens=settings.tokens,
            max_new_tokens=settings.tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
        said = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]

    def judge(self, prompt: str, replies: Sequence[str], reference: str) -> Judged:
        """Score, label and penalise each candidate against the reference."""
        other, other_gradient = self.scored(reference)
        other_utility = self.utility(prompt, reference)
        rows = []
        for reply in replies:
            reward, gradient = self.scored(reply)
            utility = self.utility(prompt, reply)
            preference = torch.sigmoid(utility - other_utility)
            overconfidence = torch.sigmoid(reward - other) - preference
            penalty = overconfidence * (gradient @ (gradient - other_gradient))
            rows.append(torch.stack([reward, penalty, preference, utility]))
        reward, penalty, preference, utility = torch.stack(rows, 1)
        return Judged(reward, penalty, preference, torch.cat([utility, other_utility[None]]))

    def reward(self, reply: str) -> Tensor:
        """r of a reply without its prompt, a number on the tape of the classifier's weights."""
        model = self.models.reward_model
        inputs = self.models.reward_tokenizer(
            reply, truncation=True, max_length=self.settings.longest, return_tensors="pt"
        )
        logits: Tensor = model(**inputs.to(model.device)).logits
        return logits[0, 0]

    def scored(self, reply: str) -> tuple[Tensor, Tensor]:
        """r and ∇r over the classifier, in one vector (P,)."""
        reward = self.reward(reply)
        gradient = torch.autograd.grad(reward, self._head)
        return reward.detach(), torch.cat([part.flatten() for part in gradient])

    @torch.no_grad()
    def utility(self, prompt: str, reply: str) -> Tensor:
        """U: the oracle's mean log-likelihood of the reply's tokens, prompt and reply read anew."""
        rendered = self.rendered(prompt)
        begin = self._encode(rendered)["input_ids"].shape[1]
        inputs = self._encode(rendered + reply)
        logits = self.models.oracle(**inputs).logits[0, begin - 1 : -1].float()  # (reply tokens, V)
        said = logits.log_softmax(-1).gather(1, inputs["input_ids"][0, begin:, None])
        return (self.settings.offset + said.mean()).clamp(self.settings.lowest, self.settings.highest)

    def learn(self, prompt: str, reply: str, share: float) -> Tensor:
        """Add `share` of the gradient of the cross-entropy of prompt and reply; the cross-entropy, nats a token."""
        model = self.models.policy
        model.train()
        inputs = self._encode(self.rendered(prompt) + reply)
        loss: Tensor = model(**inputs, labels=inputs["input_ids"]).loss
        (share * loss).backward()
        return loss.detach()

    def retrain(self, reply: str, reference: str, preference: Tensor, share: float) -> Tensor:
        """Add `share` of the gradient of BCE(σ(r(z) − r(ref)), p*), both read anew; the loss in nats."""
        margin = self.reward(reply) - self.reward(reference)
        loss = binary_cross_entropy_with_logits(margin, preference.to(margin))
        (share * loss).backward()
        return loss.detach()

    def forget(self) -> None:
        """Drop the gradients that `learn` and `retrain` have left."""
        for parameter in (*self._adapter, *self._head):
            parameter.grad = None

    def _encode(self, text: str) -> Any:
        inputs = self.models.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        return {name: inputs[name].to(self.models.policy.device) for name in ("input_ids", "attention_mask")}

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[phase] += time.perf_counter() - start
