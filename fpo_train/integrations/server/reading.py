"""Requests as texts: what the three formats have in common, looked at before anything waits for the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fpo_train.config import ServeConfig
from fpo_train.errors import RunError
from fpo_train.integrations.reward import FPOReward
from fpo_train.integrations.texts import next_in_group, reply_in, talk_in

from . import formats
from .limits import Refused
from .owner import REFERENCE, Seen, Texts


class Reader:
    """Requests in, texts out; what is refused is refused with 422."""

    def __init__(self, config: ServeConfig, reward: FPOReward) -> None:
        self._limits, self._in_group = config.limits, config.reference == formats.OF_GROUP
        self._compares = config.penalty != "none" or reward.trains
        tokenizer = getattr(reward.model, "tokenizer", None)
        special = getattr(tokenizer, "all_special_tokens", None) or []
        self._ends = [*(end.strip() for end in config.reply_ends.split(",") if end.strip()), *special]

    def nothing(self) -> Texts:
        """Of a request that brings no texts."""
        return Texts([], [], [])

    def batch(self, batch: formats.Batch, collect: bool = False) -> Texts:
        """Of our own format.

        Raises:
            Refused: lists that do not fit each other, too much, or nothing to compare with.
        """
        count = len(batch.prompts)
        if len(batch.completions) != count:
            raise Refused(422, f"completions: wanted one for each of {count} prompts, got {len(batch.completions)}")
        if REFERENCE in batch.columns:
            raise Refused(422, f"columns: what to compare with goes into references, not into {REFERENCE!r}")
        for name in ("prompts", "completions", "log_metric", "log_extra"):
            if name in batch.columns:
                raise Refused(422, f"columns: {name!r} is a name of its own; wanted another")
        for name, values in batch.columns.items():
            if len(values) != count:
                raise Refused(422, f"columns: {name!r} holds {len(values)} values for {count} completions")
        prompts, completions = [_plain(one) for one in batch.prompts], [_plain(one) for one in batch.completions]
        references = self._references(batch.references, prompts, completions)
        return self._checked(Texts(prompts, completions, references, batch.columns, collect))

    def watched(self, batch: formats.WatchedBatch) -> Seen:
        """Of a step that is watched; without references where nothing is compared.

        Raises:
            Refused: see `batch`; also rewards or utilities that are not one a completion.
        """
        count = len(batch.completions)
        for name, values in (("rewards", batch.rewards), ("utilities", batch.utilities)):
            if values is not None and len(values) != count:
                raise Refused(422, f"{name}: wanted one for each of {count} completions, got {len(values)}")
        if batch.references is None and not batch.steering:
            batch = batch.model_copy(update={"references": [None] * count})
        return Seen(
            **vars(self.batch(batch)), rewards=batch.rewards, utilities=batch.utilities, steering=batch.steering
        )

    def openrlhf(self, query: formats.OpenRLHFQuery) -> Texts:
        """Of OpenRLHF's: the reply is what stands behind the prompt, without the tokens that close it.

        Raises:
            Refused: see `batch`; also a query without its prompt, and a missing label, since no answer says so.
        """
        if not len(query.query) == len(query.prompts) == len(query.labels):
            sizes = f"{len(query.query)}, {len(query.prompts)} and {len(query.labels)}"
            raise Refused(422, f"query, prompts, labels: wanted as many of each, got {sizes}")
        replies = []
        for place, (whole, prompt) in enumerate(zip(query.query, query.prompts, strict=True)):
            reply = formats.reply_of(whole, prompt)
            if reply is None:
                told = "it does not hold its prompt, so that the reply is not known; was the prompt cut?"
                raise Refused(422, f"query {place}: {told}")
            replies.append(formats.without_ends(reply, self._ends))
        return self._single(query.prompts, replies, query.labels, "labels")

    def slime(self, sample: formats.SlimeSample) -> Texts:
        """Of slime's.

        Raises:
            Refused: see `openrlhf`.
        """
        reply = formats.without_ends(sample.response, self._ends)
        return self._single([_plain(sample.prompt)], [reply], [sample.label], "label")

    def _single(self, prompts: Sequence[Any], replies: Sequence[str], labels: Sequence[str | None], name: str) -> Texts:
        references = list(labels)
        if not self._compares:
            references = list(replies)
        elif not all(references):
            place = next(n for n, one in enumerate(references) if not one)
            raise Refused(422, f"{name} {place}: wanted the text to compare the reply with, got {references[place]!r}")
        return self._checked(Texts(prompts, replies, references, {}, True))

    def _references(self, given: Any, prompts: list[Any], completions: list[Any]) -> list[str | None]:
        if isinstance(given, list):
            if len(given) != len(prompts):
                raise Refused(422, f"references: wanted one for each of {len(prompts)} prompts, got {len(given)}")
            return given
        if given is None and not self._in_group:
            if not self._compares:
                return [reply if isinstance(reply, str) else reply[0]["content"] for reply in completions]
            raise Refused(422, 'references: wanted a text for each completion, or "group"; got none')
        return _of_group(prompts, completions)

    def _checked(self, texts: Texts) -> Texts:
        if len(texts) > self._limits.texts:
            raise Refused(422, f"wanted at most {self._limits.texts} completions a request, got {len(texts)}")
        for name, some in (("prompts", texts.prompts), ("completions", texts.completions)):
            self._look(name, some)
        self._look("references", [one for one in texts.references if one is not None])
        return texts

    def _look(self, name: str, some: Sequence[Any]) -> None:
        for place, whole in enumerate(some):
            if sum(map(len, _parts(whole))) > self._limits.characters:
                told = f"wanted at most {self._limits.characters} characters"
                raise Refused(422, f"{name}.{place}: {told}, got {sum(map(len, _parts(whole)))}")
            try:
                for part in _parts(whole):
                    part.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
                raise Refused(422, f"{name}.{place}: it is no Unicode text: {error.reason}") from error


def _plain(one: Any) -> Any:
    """Messages as dictionaries."""
    return one if isinstance(one, str) else [message.model_dump() for message in one]


def _parts(one: Any) -> Iterator[str]:
    yield from [one] if isinstance(one, str) else (message["content"] for message in one)


def _of_group(prompts: Sequence[Any], completions: Sequence[Any]) -> list[str | None]:
    """The next completion of the same prompt for each.

    Raises:
        Refused: one is alone, so that it would be compared with itself.
    """
    keys, replies = [], []
    for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            keys.append(repr(talk_in(prompt, "prompts")))
            replies.append(reply_in(completion, "completions"))
        except RunError as error:
            raise Refused(422, f"completions.{place}: {error}") from error
    sizes = Counter(keys)
    for place, key in enumerate(keys):
        if sizes[key] == 1:
            told = "it is the only one of its prompt in this request; wanted its group, or references"
            raise Refused(422, f"completions.{place}: {told}")
    return list(next_in_group(keys, replies))
