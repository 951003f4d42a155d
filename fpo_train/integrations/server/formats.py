"""What goes over the wire: our own batches, OpenRLHF's remote reward (0.11) and slime's `remote_rm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

OF_GROUP: Literal["group"] = "group"


class Ours(BaseModel):
    """A name that is not there is refused: it would be a misspelt one."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Theirs(BaseModel):
    """What another version sends beside is let be."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Message(Theirs):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | Annotated[list[Message], Field(min_length=1)]
Completion = str | Annotated[list[Message], Field(min_length=1, max_length=1)]


class Batch(Ours):
    """Completions to judge."""

    prompts: list[Prompt] = Field(min_length=1, description="Texts or lists of messages, one a completion.")
    completions: list[Completion] = Field(min_length=1, description="Texts, or lists of one message.")
    references: list[str | None] | Literal["group"] | None = Field(
        None,
        description="What each completion is compared with (null: it cannot be scored); group: the next completion of "
        "the same prompt in this request. May be left out where the server's own setting says group.",
    )
    columns: dict[str, list[Any]] = Field(
        default_factory=dict, description="More of the data set, a value a completion, for the server's oracle."
    )


class ScoreBatch(Batch):
    """Completions to judge without counting them."""

    collect: bool = Field(False, description="Keep them for the next update, where there is an oracle.")


class WatchedBatch(Batch):
    """A step of a run that uses no penalty, with what its own reward said."""

    rewards: list[float | None] = Field(min_length=1, description="The trainer's own, one a completion.")
    utilities: list[float | None] | None = Field(
        None, description="What the completions are truly worth; where left out, the server's oracle is asked."
    )
    steering: bool = Field(False, description="Also the mean of c(z) · ⟨ḡ, u(z)⟩, by the server's reward model.")


class Step(BaseModel):
    """A step that was watched."""

    iteration: int = Field(description="Counted from the first request.")
    reward: float | None = Field(description="Mean of the trainer's rewards.")
    oracle_utility: float | None = Field(description="Mean of what the completions are worth.")
    steering: float | None = Field(None, description="Mean, where it was asked for.")
    warning: str | None = Field(None, description="Why this looks like collapse.")


class Steps(BaseModel):
    """The latest steps that were watched."""

    steps: list[Step]


class Scores(BaseModel):
    """A number a completion; null where one cannot be scored."""

    rewards: list[float | None] = Field(description="r(z)")
    penalties: list[float | None] = Field(description="In the units of γ.")
    effective: list[float | None] = Field(description="r(z) − γ · penalty(z): what a policy should maximise.")


class Updated(BaseModel):
    """A training of the reward model."""

    loss: float | None = Field(description="Mean, in nats a pair; null where there was nothing to learn from.")
    pairs: int = Field(description="Labelled pairs that are kept.")
    updates: int = Field(description="Trainings so far.")


class OpenRLHFQuery(Theirs):
    """What OpenRLHF posts to `--reward.remote_url`."""

    query: list[str] = Field(min_length=1, description="Prompt and reply in one text.")
    prompts: list[str] = Field(min_length=1, description="The prompts alone.")
    labels: list[str | None] = Field(min_length=1, description="The references.")


class OpenRLHFScores(BaseModel):
    """What OpenRLHF reads of the answer: numbers, all of them."""

    rewards: list[float] = Field(description="r(z) − γ · penalty(z)")
    scores: list[float] = Field(description="The same.")
    extra_logs: dict[str, list[float]] = Field(description="r(z) and the penalty.")


class SlimeSample(Theirs):
    """What slime posts to `--rm-url`."""

    prompt: Prompt
    response: str
    label: str | None = Field(None, description="The reference.")


class Health(BaseModel):
    """Whether new work is taken."""

    status: Literal["ready", "draining"]
    queue: int = Field(description="Requests that wait.")


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


def reply_of(query: str, prompt: str) -> str | None:
    """What stands behind the prompt in a query; None where the query does not hold it.

    A tokenizer may have put its own beginning in front of the prompt.
    """
    _, found, reply = query.partition(prompt) if prompt else ("", True, query)
    return reply if found else None


def without_ends(reply: str, ends: Sequence[str]) -> str:
    """A reply without the texts that close it, however many of them."""
    while found := next((end for end in ends if end and reply.endswith(end)), None):
        reply = reply[: -len(found)]
    return reply


def sentence(errors: Sequence[Any]) -> str:
    """Pydantic's complaints as one: where, what is wanted; never what was given, which may be long, or private."""
    told = [f"{'.'.join(str(part) for part in one['loc'][1:]) or 'body'}: {one['msg']}" for one in errors[:3]]
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    return "; ".join(told) + more
