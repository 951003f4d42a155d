"""Everything that `fpo-train attribute` can be told, as frozen keyword-only dataclasses. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import not_negative, words

SKETCHED = 4096  # numbers of a sketch where nothing is said and the gradients are not a head's


@dataclass(frozen=True, kw_only=True)
class ReadModelConfig:
    """The reward model that is asked, and how it reads a prompt and a reply."""

    model: str = ""
    """A sequence classifier with one score: a local folder, a hub id, or the `reward_model/` folder of a run whose
    `reward_model.kind` was `classifier`."""
    input: Literal["auto", "chat", "pair", "reply", "written"] = "auto"
    """What it reads, as `reward_model.input` of a run; `auto`: as the run's folder says, `chat` where none does."""
    max_tokens: int = 0
    """Its inputs are cut at this many tokens; 0: at its context."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Its weights; scores and products are float32 or wider always."""

    def __post_init__(self) -> None:
        words("reward_model", self)
        not_negative("reward_model", max_tokens=self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class AttributeConfig:
    """Which training pairs taught a reward model to like, or to dislike, a reply."""

    out: str = "runs/attribute"
    """Folder for the results and for what was computed of the pairs, which the next question finds again."""
    reward_model: ReadModelConfig = field(default_factory=ReadModelConfig)
    """The reward model."""
    pairs: str = ""
    """The pairs it was trained on: a file or folder with `prompt`, `chosen`, `rejected` and, if you like, `preference`
    in each row (the forms of `oracle.file`), or the hub id of a dataset."""
    split: str = "train"
    """Split of a dataset."""
    subset: str = ""
    """Subset (configuration) of a hub dataset that has several."""
    system: str = ""
    """System prompt put before prompts that have none of their own, those of the replies too."""
    limit: int = 0
    """Take the first so many pairs; 0: all."""
    replies: str = ""
    """File of the replies to explain, `prompt` and `reply` (or `completion`) in each row."""
    prompt: str = ""
    """In place of a file: the prompt of one reply."""
    reply: str = ""
    """That reply."""
    parameters: str = "head"
    """Weights that gradients are over: `head`, `all`, `lora`, `trainable` (what a run's folder says was trained there),
    or comma-separated names and globs."""
    dim: int = 0
    """Numbers a gradient sketch, a power of two from 64 to 16384; 0: a head's gradients are taken whole, others'
    sketched to 4096."""
    seed: int = 0
    """Seed of the sketch."""
    checkpoints: str = ""
    """Folder of a `CheckpointStore`: influence is summed over its states, each times its learning rate (TracIn)."""
    curvature: bool = False
    """Put the inverse of the pairs' damped curvature between the gradients (influence functions)."""
    damping: float = 0.1
    """λ of the curvature, relative to its mean diagonal."""
    embedder: Literal["auto", "minilm", "reward_model"] = "auto"
    """Whose embeddings are the baseline: MiniLM's mean over tokens, or what the reward model's score head reads;
    `auto`: MiniLM where it has been fetched."""
    top: int = 10
    """Pairs shown for each side; 0: all."""
    rows_at_once: int = 16
    """Texts on one tape."""

    def __post_init__(self) -> None:
        words("", self)
        not_negative("attribute", limit=self.limit, top=self.top)
        for name, value in (("out", self.out), ("reward_model.model", self.reward_model.model), ("pairs", self.pairs)):
            if not value:
                raise ValueError(f"{name}: wanted a name, got an empty one")
        if not (self.rows_at_once > 0 and self.damping > 0):
            name = "damping" if self.rows_at_once > 0 else "rows_at_once"
            raise ValueError(f"{name}: wanted a number above 0, got {getattr(self, name)}")
        if self.dim and (not 64 <= self.dim <= 16384 or self.dim & (self.dim - 1)):
            raise ValueError(f"dim: wanted 0 or a power of two from 64 to 16384, got {self.dim}")
        if bool(self.replies) == bool(self.reply):
            told = "both" if self.reply else "neither"
            raise ValueError(f"replies: wanted a file, or prompt and reply in its place, got {told}")
        if self.prompt and not self.reply:
            raise ValueError("prompt: it goes with reply; a file of replies has prompts of its own")
        if self.reply and not self.prompt and self.reward_model.input != "reply":
            raise ValueError("prompt: reply needs it, unless reward_model.input is reply")
        if self.checkpoints and self.curvature:
            raise ValueError("curvature: a sum over checkpoints has none; wanted curvature or checkpoints, got both")

    @property
    def sketched(self) -> int:
        """Numbers a gradient sketch; 0: gradients are a head's, taken whole."""
        return self.dim or (0 if self.parameters == "head" else SKETCHED)
