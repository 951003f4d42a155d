"""The labelled pairs that an oracle of human preferences brings along, as the policy reads them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fpo_train.config import RunConfig
from fpo_train.data.limits import check_tokens, rows_of
from fpo_train.data.prompts import Prompt, Serves, render, shorten
from fpo_train.data.turns import Talk
from fpo_train.errors import RunError
from fpo_train.policy import Policy
from fpo_train.reward_model.replay import FIT_PLACE, Pair

from .preferences import read_preferences


@dataclass(frozen=True)
class HumanPairs:
    """People's pairs that the policy's context holds, and what became of the others."""

    pairs: list[Pair] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """`read`, `cut` (kept with a shortened prompt) and `dropped`; empty where there is no file."""

    @property
    def texts(self) -> list[tuple[Talk, str]]:
        """Every pair's prompt with each of its replies."""
        return [(pair.prompt.talk, text) for pair in self.pairs for text in (pair.chosen_text, pair.reference_text)]

    def told(self) -> str:
        """A line on the pairs that were too long; empty where none was."""
        cut, dropped = (self.counts.get(name, 0) for name in ("cut", "dropped"))
        if not cut + dropped:
            return ""
        return f"oracle.file: of {self.counts['read']} pairs {cut} were cut and {dropped} dropped, as too long"


def human_pairs(config: RunConfig, policy: Policy) -> HumanPairs:
    """The pairs of `oracle.file`: prompt, the longer reply and the closing token fit the policy's context.

    A longer prompt is shortened as `data.truncate` has it, and a pair whose replies leave no room for that is dropped;
    under "refuse" both are refused.

    Raises:
        RunError: a file that cannot be used, a pair that does not fit, or one with a token that the model cannot read.
    """
    rows, refuse = rows_of(policy.lm), config.data.truncate == "refuse"
    serves = Serves(policy.tokenizer, "policy.model")
    counts: Counter[str] = Counter(read=0, cut=0, dropped=0)
    pairs = []
    known = read_preferences(Path(config.oracle.file).expanduser(), config.data.system)
    for number, (talk, chosen, rejected, preference) in enumerate(known, start=1):
        counts["read"] += 1
        where = f"oracle.file: pair {number} of {config.oracle.file}"
        serves(talk, where)
        whole = render(policy.tokenizer, talk, config.data.double_bos)
        first, second = (_closed(policy, reply) for reply in (chosen, rejected))
        for ids in (whole, first, second):
            check_tokens(ids, rows, policy.tokenizer, where, "policy.model")
        room = policy.context - max(len(ids) + (ids[-1] != policy.eos) for ids in (first, second))  # rows end with EOS
        longest = min(room, config.data.max_tokens or room)
        kept = shorten(policy.tokenizer, talk, whole, longest, config.data)
        if kept is None and refuse:
            bound = "data.max_tokens leaves" if config.data.max_tokens == longest else "the model's context leaves"
            raise RunError(
                f"{where} has a prompt of {len(whole)} tokens, but {bound} {max(longest, 0)} beside its longer reply "
                f"of {policy.context - room}; data.truncate is refuse, and header or right would cut or drop the pair"
            )
        if kept is None:
            counts["dropped"] += 1
            continue
        counts["cut"] += len(kept) < len(whole)
        prompt = Prompt.of(f"human-{number}", talk, kept)
        pair = Pair(
            prompt=prompt,
            chosen=first,
            reference=second,
            chosen_text=chosen,
            reference_text=rejected,
            preference=preference,
            iteration=FIT_PLACE,
            features=None,
        )
        pairs.append(pair)
    return HumanPairs(pairs, dict(counts))


def _closed(policy: Policy, reply: str) -> tuple[int, ...]:
    """A reply's tokens with the EOS that closes it, unless people have written an end token themselves."""
    ids = policy.tokenizer(reply, add_special_tokens=False)["input_ids"]
    return tuple(ids if ids and ids[-1] in policy.ends else [*ids, policy.eos])
