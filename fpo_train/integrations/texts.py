"""Prompts and completions as other trainers hand them over, texts or lists of messages, and what each is compared with:
a column of the data, another completion, or a frozen model's own reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fpo_train.config import RolloutConfig
from fpo_train.config.seeds import mix
from fpo_train.data.prompts import Prompt, render
from fpo_train.data.turns import Talk, turn_of
from fpo_train.errors import RunError
from fpo_train.policy.generation import end_tokens, ended, generate
from fpo_train.processes import Ranks
from fpo_train.reward_model.replay import Pair
from fpo_train.rollout.sampling import RowSampler

from .groups import Grouped

Reference = str | Callable[[Sequence[Any]], Sequence[str]]
OF_GROUP = "group"
TRAINERS = ("completion_ids", "trainer_state", "environments")  # what a trainer adds to a data set's columns
BLANK = "–"  # stands in where a text cannot be read, and is not scored


def grouped(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    reference: Reference,
    ranks: Ranks,
    device: torch.device,
    matters: Callable[[str], bool] = lambda column: False,
) -> tuple[Grouped, list[str]]:
    """Completions with their references, and why some cannot be scored: these are not usable.

    Args:
        reference: see `FPOReward`. ranks: among which groups may be split. device: of the tensors.
        matters: whether a column of the data makes of two equal prompts two.

    Raises:
        RunError: nothing to score, lists of different lengths, or no such column.
    """
    if len(prompts) != len(completions):
        raise RunError(f"completions: wanted one for each of {len(prompts)} prompts, got {len(completions)}")
    if not len(prompts):
        raise RunError("prompts: wanted at least one, got none")
    talks: list[Talk] = []
    replies, usable, complaints = [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        try:
            talk, reply = talk_in(prompt, "prompts"), reply_in(completion, "completions")
            usable.append(True)
        except RunError as error:
            talk, reply = BLANK, BLANK
            usable.append(False)
            complaints.append(str(error))
        talks.append(talk)
        replies.append(reply)
    passed = {key: value for key, value in columns.items() if isinstance(value, list) and len(value) == len(talks)}
    passed = {key: value for key, value in passed.items() if key not in TRAINERS}
    telling = sorted(key for key in passed if matters(key))
    marks = [repr([passed[key][n] for key in telling]) if telling else "" for n in range(len(talks))]
    rows = enumerate(zip(talks, usable, marks, strict=True))
    keys = [f"{'' if may else n}{talk!r}{mark}" for n, (talk, may, mark) in rows]
    others = references(prompts, keys, replies, columns, reference, ranks, usable)
    for place, other in enumerate(others):
        if other is None:
            usable[place] = False
            complaints.append("the reference is no text")
    known = [BLANK if other is None else other for other in others]
    written = Grouped.of(talks, replies, known, device, usable, marks)
    return Grouped(**vars(written) | {"groups": keys, "columns": passed}), complaints


def references(
    prompts: Sequence[Any],
    keys: Sequence[str],
    replies: Sequence[str],
    columns: Mapping[str, Any],
    reference: Reference,
    ranks: Ranks,
    usable: Sequence[bool],
) -> list[str | None]:
    """What each completion is compared with; None where that is no text.

    Args:
        keys: the completions' groups. usable: whose prompts can be read. The rest: see `grouped`.

    Raises:
        RunError: no such column, or a function that returns something else than a text a prompt.
    """
    if reference == OF_GROUP:
        every = ranks.gather_objects(list(zip(keys, replies, strict=True)))
        after = dict(zip(every, next_in_group(*map(list, zip(*every, strict=True))), strict=True))
        return [after[one] for one in zip(keys, replies, strict=True)]
    if isinstance(reference, str):
        found = column(columns, reference, len(keys))
    else:
        asked = [prompt for prompt, may in zip(prompts, usable, strict=True) if may]
        said = reference(asked) if asked else []
        if not isinstance(said, list | tuple) or len(said) != len(asked):
            wanted = f"wanted {len(asked)} texts, one a prompt"
            raise RunError(f"reference: the function returned {said!r:.80}; {wanted}")
        answers = iter(said)
        found = [next(answers) if may else None for may in usable]
    others: list[str | None] = []
    for one in found:
        try:
            others.append(reply_in(one, "reference"))
        except RunError:
            others.append(None)
    return others


def reply_in(completion: Any, where: str) -> str:
    """The reply: a text, or the content of the assistant's one message.

    Raises:
        RunError: anything else, such as several messages with tool calls between them.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list | tuple) or len(completion) != 1:
        raise RunError(f"{where}: wanted a text or one message of the assistant, got {completion!r:.80}")
    role, text = turn_of(completion[0], "completion", where)
    if role != "assistant":
        raise RunError(f"{where}: wanted a message of the assistant, got one of the {role}")
    return text


def column(columns: Mapping[str, Any], name: str, count: int) -> Sequence[Any]:
    """A data set's column, as a trainer passes it on: a value a completion.

    Raises:
        RunError: there is none of that name, or it has another length.
    """
    if name not in columns:
        there = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, list))) or "none"
        raise RunError(
            f'reference: the data set has no column "{name}"; those passed on: {there}. reference="group" '
            "compares with another completion of the prompt, and a function is called with the prompts"
        )
    found = columns[name]
    if not isinstance(found, list | tuple) or len(found) != count:
        size = f"{len(found)} values" if isinstance(found, list | tuple) else type(found).__name__
        raise RunError(f'reference: the column "{name}" holds {size} for {count} completions; wanted one each')
    return found


def labelled(talk: Talk, chosen: str, reference: str, preference: float, call: int) -> Pair:
    """A pair of texts."""
    return Pair(
        prompt=Prompt.of("", talk, ()),
        chosen=(),
        reference=(),
        chosen_text=chosen,
        reference_text=reference,
        preference=preference,
        iteration=call,
        features=None,
    )


def talk_in(prompt: Any, where: str) -> Talk:
    """What is asked: a text stays one, messages become turns, all of them.

    Raises:
        RunError: it is neither, or a message of another role than system, user and assistant.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple) or not prompt:
        raise RunError(f"{where}: wanted a text or a list of messages, got {prompt!r:.80}")
    return tuple(turn_of(message, "prompt", where) for message in prompt)


def next_in_group(keys: Sequence[str], replies: Sequence[str]) -> list[str]:
    """Another reply to the same prompt for each; a reply that is alone, or is all there is, gets itself.

    The different replies of a group stand in a circle, in an order that their texts alone decide, and each is compared
    with the one behind it: every reply is a reference once, whoever is asked beside it and in whatever order.
    """
    circles: dict[str, list[str]] = {}
    for key, reply in zip(keys, replies, strict=True):
        circle = circles.setdefault(key, [])
        if reply not in circle:
            circle.append(reply)
    for key, circle in circles.items():
        circle.sort(key=lambda reply: (mix("circle", key, reply), reply))
    after = {
        (key, reply): circle[(n + 1) % len(circle)] for key, circle in circles.items() for n, reply in enumerate(circle)
    }
    return [after[one] for one in zip(keys, replies, strict=True)]


class BaseReplies:
    """Replies of the frozen base beneath a trainer's model, one a prompt, sampled once and kept.

    A reply follows from its prompt and the seed alone, and torch's random streams are left as they are.

        reward = FPOReward(…, reference=BaseReplies(model, tokenizer, max_new_tokens=64))

    Args:
        model: a causal language model that is not trained, or a PEFT model: its adapters are off meanwhile.
        max_new_tokens, temperature, top_p, top_k: of the sampling; take those of the trainer.
        seed: of the sampling. kept: replies that are remembered, the latest.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 2**31,
        seed: int = 0,
        kept: int = 65536,
    ) -> None:
        self._model, self._tokenizer, self._seed, self._most = model, tokenizer, seed, kept
        self._settings = RolloutConfig(
            max_new_tokens=max_new_tokens, min_new_tokens=0, temperature=temperature, top_p=top_p, top_k=top_k
        )
        self._known: dict[Talk, str] = {}

    def __call__(self, prompts: Sequence[Any]) -> list[str]:
        """A reply to each prompt, texts or messages."""
        talks = [talk_in(prompt, "prompts") for prompt in prompts]
        if new := [talk for talk in dict.fromkeys(talks) if talk not in self._known]:
            found = zip(new, self._sample(new), strict=True)
            self._known |= found
        said = [self._known[talk] for talk in talks]
        for talk in list(self._known)[: max(0, len(self._known) - self._most)]:
            del self._known[talk]
        return said

    def state_dict(self) -> dict[str, Any]:
        """The replies so far."""
        return {"replies": list(self._known.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._known = {
            talk if isinstance(talk, str) else tuple(map(tuple, talk)): said for talk, said in state["replies"]
        }

    @torch.no_grad()
    def _sample(self, talks: list[Talk]) -> list[str]:
        lm = self._model.get_base_model() if hasattr(self._model, "peft_config") else self._model
        rows = [
            self._tokenizer(talk)["input_ids"] if isinstance(talk, str) else render(self._tokenizer, talk)
            for talk in talks
        ]
        ends, pad = end_tokens(lm, self._tokenizer), self._tokenizer.pad_token_id or 0
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=lm.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
        streams = (torch.Generator().manual_seed(mix("base reply", self._seed, repr(talk))) for talk in talks)
        count = self._settings.max_new_tokens
        draws = torch.stack([torch.rand(count, generator=stream, dtype=torch.float64) for stream in streams])
        choose = RowSampler(self._settings, draws.to(lm.device))
        with at_rest(lm), self._model.disable_adapter() if hasattr(self._model, "peft_config") else nullcontext():
            out = generate(lm, ids, mask, choose, ends=ends, pad=pad, most=count)
        said = [ended(row, ends) for row in out[:, width:].tolist()]
        return [self._tokenizer.decode(row, skip_special_tokens=True) for row in said]


def _talk(stored: Any) -> Talk:
    return stored if isinstance(stored, str) else tuple((role, text) for role, text in stored)


@contextmanager
def modes_of(model: torch.nn.Module) -> Iterator[None]:
    """Each module's own mode, training or not, comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def at_rest(model: torch.nn.Module) -> Iterator[None]:
    """In eval mode and in the model's own number format, whatever a trainer is about; each module's mode comes back."""
    device = next(model.parameters()).device.type
    with modes_of(model), torch.autocast(device, enabled=False):
        model.eval()
        yield
