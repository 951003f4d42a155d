"""Replies by the policy in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from fpo_train.config import RolloutConfig
from fpo_train.data.prompts import Prompt
from fpo_train.policy import Policy, prefix
from fpo_train.policy.adapters import POLICY, Speaking, only_in
from fpo_train.policy.generation import generate
from fpo_train.policy.prefix import Prefix

from .base import Rollout
from .packing import packed, unpacked
from .sampling import RowSampler, uniforms


class TransformersSampler:
    """transformers' generation; a prompt is read once, its candidates go on from there."""

    def __init__(self, policy: Policy, settings: RolloutConfig, seed: int, unpacks: bool = False) -> None:
        """`unpacks`: keep 4-bit weights unpacked while an iteration's rows are decoded, all at once."""
        self._policy = policy
        self._settings = settings
        self._seed = seed
        self._unpacks = unpacks

    def __call__(self, prompts: list[Prompt], place: int, first: int, rows_at_once: int = 0) -> Rollout:
        """See `Sampler`. Candidates and references are decoded together, each from the prompt as its model reads it."""
        n = self._settings.candidates
        with self._dropout():
            told = prefix.read(self._policy, prompts)
            with self._policy.base():
                base = prefix.read(self._policy, prompts)
            together = not rows_at_once or rows_at_once >= len(prompts) * (n + 1)  # fewer: memory has run short
            with unpacked(self._policy.lm) if self._unpacks and together else nullcontext():
                replies = self._generate(told, list(range(n + 1)), place, first, rows_at_once, base)
        return Rollout.of(self._policy, prompts, replies, n, self._settings.skip_blank, base)

    def base_replies(
        self, prompts: list[Prompt], replies: int, place: int, first: int, rows_at_once: int = 0
    ) -> list[list[int]]:
        """See `Sampler`."""
        with self._policy.base():
            told = prefix.read(self._policy, prompts)
            return self._generate(told, list(range(replies)), place, first, rows_at_once)

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """The policy's adapter's dropout on, where `rollout.lora_dropout` asks for it; of nothing else."""
        modules = [m for name, m in self._policy.model.named_modules() if f".lora_dropout.{POLICY}" in name]
        for module in modules if self._settings.lora_dropout else []:
            module.train()
        try:
            yield
        finally:
            for module in modules:
                module.eval()

    @torch.no_grad()
    def _generate(
        self, told: Prefix, numbers: list[int], place: int, first: int, rows_at_once: int, base: Prefix | None = None
    ) -> list[list[int]]:
        """Replies `numbers` to each prompt, prompt-major, each cut behind its end token.

        With the prompts as the base reads them, reply number `candidates` is the base's, without the adapter.
        """
        rows = [(b, n) for b in range(len(told.ids)) for n in numbers]
        found: dict[tuple[int, int], list[int]] = {}
        for start in range(0, len(rows), rows_at_once or len(rows)):
            some = rows[start : start + rows_at_once] if rows_at_once else rows
            theirs = [row for row in some if base is not None and row[1] == self._settings.candidates]
            own = [row for row in some if row not in theirs]
            speaking = Speaking(torch.tensor([True] * len(own) + [False] * len(theirs), device=self._policy.device))
            parts = [(told, own), *([(base, theirs)] if base is not None else [])]
            with only_in(self._policy.model, POLICY, speaking) if theirs else nullcontext():
                said = self._generate_rows([part for part in parts if part[1]], place, first, speaking)
            found |= zip(own + theirs, said, strict=True)
        return [found[row] for row in rows]

    def _generate_rows(
        self, parts: list[tuple[Prefix, list[tuple[int, int]]]], place: int, first: int, speaking: Speaking
    ) -> list[list[int]]:
        """Replies to the rows (prompt, number) of each prefix, part after part."""
        policy, settings = self._policy, self._settings
        told, rows = parts[0][0], [row for _, some in parts for row in some]
        owners = torch.tensor([b for b, _ in rows], device=policy.device)
        width = told.ids.shape[1]
        draws = uniforms(self._seed, place, [(first + b, n) for b, n in rows], settings.max_new_tokens)
        known = None
        if told.layers is not None and width > 1:  # generation has to read one token itself
            split = owners.split([len(some) for _, some in parts])
            known = prefix.cache(
                [(one, mine) for (one, _), mine in zip(parts, split, strict=True)], width - 1, settings.max_new_tokens
            )
        with packed(policy.lm):
            out = generate(
                policy.lm,
                told.ids[owners],
                told.mask[owners],
                RowSampler(settings, draws.to(policy.device)),
                ends=policy.ends,
                pad=policy.eos,
                most=settings.max_new_tokens,
                least=settings.min_new_tokens,
                cached=policy.caches,
                known=known,
                kept=speaking.kept,
            )
        return [policy.cut(row) for row in out[:, width:].tolist()]
