"""Sampling: N candidates of the policy and one reference reply of the base, for all prompts of an iteration."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fpo_train.data.prompts import Prompt
from fpo_train.data.turns import Talk
from fpo_train.policy import NO_STATES, Encoded, Policy, Sequences, offsets_of, prefix, wide
from fpo_train.policy.generation import check_finite
from fpo_train.policy.prefix import Prefix


@dataclass(frozen=True)
class Rollout:
    """B prompts with N candidates and a reference each; row b·(N+1)+n is candidate n, n = N the reference."""

    prompts: list[Prompt]
    replies: list[list[int]]  # B·(N+1) token lists
    sequences: Sequences
    candidates: int
    texts: list[str]  # B·(N+1), decoded once
    usable: Tensor  # (B, N) bool: candidates that may be chosen
    prefix: Prefix | None = field(default=None, repr=False)  # the prompts as the base read them while it generated

    @classmethod
    def of(
        cls,
        policy: Policy,
        prompts: list[Prompt],
        replies: list[list[int]],
        candidates: int,
        skip_blank: bool = False,
        prefix: Prefix | None = None,
    ) -> Rollout:
        """A rollout of given replies; with `skip_blank`, candidates without any text are not usable."""
        owners = [prompt for prompt in prompts for _ in range(candidates + 1)]
        texts = [policy.decode(reply) for reply in replies]
        said = torch.tensor([not skip_blank or bool(text) for text in texts]).view(len(prompts), candidates + 1)
        sequences = policy.sequences(owners, replies)
        return cls(prompts, replies, sequences, candidates, texts, said[:, :-1].to(policy.device), prefix)

    def talk(self, row: int) -> Talk:
        """What a row replies to."""
        return self.prompts[row // (self.candidates + 1)].talk

    def chosen(self, best: Tensor) -> Tensor:
        """Row numbers (B,) of the candidates best (B,)."""
        return best + self.stride(best)

    def references(self, like: Tensor) -> Tensor:
        """Row numbers (B,) of the references."""
        return self.stride(like) + self.candidates

    def stride(self, like: Tensor) -> Tensor:
        """First row of each prompt, (B,)."""
        return torch.arange(len(self.prompts), device=like.device) * (self.candidates + 1)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Rows of all candidates and of their references, (B·N,) each."""
        first = self.stride(self.sequences.ids)[:, None]
        candidates = first + torch.arange(self.candidates, device=first.device)
        return candidates.flatten(), (first + self.candidates).expand_as(candidates).flatten()


class Readings:
    """The frozen base's readings of a rollout, each computed once; a prompt is read once for all its replies.

    They are the base's at rest, though the policy be learning while they are asked for.
    """

    def __init__(self, policy: Policy, rollout: Rollout, rows_at_once: int = 0) -> None:
        self._policy = policy
        self._rollout = rollout
        self.rows_at_once = rows_at_once
        self._some: dict[int, tuple[Tensor, Tensor]] = {}  # row → its closing state and the predicting ones

    @property
    def complete(self) -> bool:
        """Whether all rows have been read."""
        return "_all" in self.__dict__

    def of(self, rows: Tensor | None = None) -> Encoded:
        """All rows, or some: these alone are read if nobody has asked for all. What was read is kept."""
        if rows is None:
            return self._all
        if self.complete:
            return self._all.rows(rows)
        wanted = rows.tolist()
        new = [row for row in dict.fromkeys(wanted) if row not in self._some]
        if new:
            read = self._encode(torch.tensor(new, device=rows.device))
            self._some.update(zip(new, zip(read.closing, read.spans(), strict=True), strict=True))
        sequences = self._rollout.sequences.rows(rows)
        closing, predicting = zip(*(self._some[row] for row in wanted), strict=True)
        return Encoded(sequences, torch.stack(closing), torch.cat(predicting), offsets_of(sequences))

    @cached_property
    def _all(self) -> Encoded:
        return self._encode(torch.arange(len(self._rollout.replies), device=self._policy.device))

    @torch.no_grad()
    def _encode(self, rows: Tensor) -> Encoded:
        policy, rollout = self._policy, self._rollout
        sequences = rollout.sequences.rows(rows)
        with policy.at_rest(), policy.base():
            known = rollout.prefix or prefix.read(policy, rollout.prompts)
            if known.layers is None:
                return policy.encode(sequences, self.rows_at_once)
            parts = [self._continue(known, some) for some in rows.split(self.rows_at_once or len(rows))]
        closing, predicting = (torch.cat(kind) for kind in zip(*parts, strict=True))
        check_finite(closing, NO_STATES)
        return Encoded(sequences, closing, predicting, offsets_of(sequences))

    def _continue(self, known: Prefix, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Closing states (r, H) and those that predict the reply tokens (s, H), from the prompts' keys and values.

        The model is the base, at rest.
        """
        policy, rollout = self._policy, self._rollout
        owners = rows // (rollout.candidates + 1)
        lengths = known.mask.sum(1)[owners]  # (r,) tokens of each prompt
        whole = rollout.sequences.mask.sum(1)[rows]
        width = int((whole - lengths).max())
        places = lengths[:, None] + torch.arange(width, device=rows.device)  # (r, width) positions behind the prompt
        within = places < whole[:, None]
        columns = places.clamp_max(rollout.sequences.ids.shape[1] - 1)
        ids = rollout.sequences.ids[rows[:, None], columns]
        reply = rollout.sequences.reply[rows[:, None], columns] & within
        hidden = prefix.go_on(policy, known, owners, ids, within)
        closing = wide(hidden[torch.arange(len(rows), device=rows.device), whole - lengths - 1])
        shifted = torch.cat([known.last[owners][:, None].to(hidden.dtype), hidden[:, :-1]], 1)
        return closing, shifted[reply]


class Sampler(Protocol):
    """Who generates."""

    def __call__(self, prompts: list[Prompt], place: int, first: int, rows_at_once: int = 0) -> Rollout:
        """N candidates of the policy and a reference of the base for each prompt.

        Args:
            prompts: this process's. place: the iteration's number. first: index of prompts[0] among all processes'.
            rows_at_once: sequences generated together; 0: all.
        """

    def base_replies(
        self, prompts: list[Prompt], replies: int, place: int, first: int, rows_at_once: int = 0
    ) -> list[list[int]]:
        """`replies` replies of the frozen base a prompt, prompt after prompt."""
