"""Everything an evaluation can be told, as frozen keyword-only dataclasses. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import not_negative, positive, words


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who compares the answers: a model behind an OpenAI-compatible endpoint, asked at temperature 0."""

    url: str = ""
    """The endpoint, up to and with /v1; empty: the evaluation ends with the answers."""
    model: str = ""
    """Name of the model to ask."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    cache: str = ""
    """File that keeps its answers; empty: `judge.jsonl` in the evaluation's folder."""
    requests_per_minute: float = 600.0
    """The most it is asked."""
    concurrency: int = 8
    """Requests under way at once."""
    retries: int = 4
    """Tries after the first, each after twice the wait of the one before."""
    timeout: float = 60.0
    """Seconds an answer may take."""

    def __post_init__(self) -> None:
        positive("judge", requests_per_minute=self.requests_per_minute)
        positive("judge", concurrency=self.concurrency, timeout=self.timeout)
        not_negative("judge", retries=self.retries)
        for name, other in (("url", "model"), ("model", "url")):
            if getattr(self, name) and not getattr(self, other):
                raise ValueError(f"judge.{other}: judge.{name} needs it")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Greedy answers of one policy or two to a set of questions, compared pairwise by a judge."""

    out: str = "runs/eval"
    """Folder for the answers and judgements; an evaluation that was cut off there goes on."""
    questions: str = "questions"
    """`questions` (the 192 short questions that ship with the package), `truthfulqa` (817 questions from the hub), or a
    JSONL file with a `prompt` a line and, if you like, `category` and `id`."""
    limit: int = 0
    """Take the first so many questions; 0: all."""
    left: str = "base"
    """Who answers: `base`, a run's folder, or an adapter's."""
    right: str = ""
    """Whose answers are compared with them, named alike; empty: nobody's."""
    model: str = ""
    """The base model of both; empty: the one that the run or the adapter names, `smollm2` where none does."""
    dtype: Literal["run", "float32", "bfloat16"] = "run"
    """Number format of the base weights; `run`: as the run had it, float32 where there is none."""
    quantization: Literal["run", "none", "nf4", "int8"] = "run"
    """Base weights in 4 bits or 8, by bitsandbytes; `run`: as the run had them, none where there is none."""
    max_new_tokens: int = 64
    """Longest answer, in tokens (the paper: 64)."""
    rows_at_once: int = 16
    """Questions answered together."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who compares the answers."""

    def __post_init__(self) -> None:
        words("", self)
        for name in ("max_new_tokens", "rows_at_once"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: wanted a number above 0, got {getattr(self, name)}")
        if self.limit < 0:
            raise ValueError(f"limit: wanted 0 or more, got {self.limit}")
        for name in ("out", "left", "questions"):
            if not getattr(self, name):
                raise ValueError(f"{name}: wanted a name, got an empty one")
        if self.judge.url and not self.right:
            raise ValueError("right: judge.url needs it, two policies' answers are compared")

    @property
    def sides(self) -> dict[str, str]:
        """The policies by the side they stand on."""
        return {"left": self.left} | ({"right": self.right} if self.right else {})
