"""Everything a reward server can be told, as frozen keyword-only dataclasses. Imports neither torch nor triton."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .checks import not_negative, positive, words
from .settings import PenaltyKind
from .units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How requests that arrive together are scored together."""

    texts: int = 64
    """The most completions that are scored in one pass; 1: each request alone."""
    wait_ms: float = 3.0
    """Milliseconds that the first request of a pass may wait for others."""
    queue: int = 1024
    """Requests that may wait; more are answered 503."""
    rows_at_once: int = 128
    """Sequences on a tape, completions and references, which bounds the memory of large requests and of updates; 0: all
    there are."""

    def __post_init__(self) -> None:
        positive("batching", texts=self.texts, queue=self.queue)
        not_negative("batching", wait_ms=self.wait_ms, rows_at_once=self.rows_at_once)


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What a request may ask."""

    body: str = "8MiB"
    """Largest body; a larger one is answered 413."""
    texts: int = 1024
    """Completions a request; more are answered 422."""
    characters: int = 65536
    """Characters a text; longer ones are answered 422. What is within is cut to `max_tokens`."""
    timeout: float = 120.0
    """Seconds until a request that has no answer yet is answered 504, and one whose body has not arrived 408."""

    def __post_init__(self) -> None:
        positive("limits", texts=self.texts, characters=self.characters, timeout=self.timeout)
        parse_bytes(self.body, "limits.body")


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """How the reward model is trained, where there is an oracle."""

    train: Literal["parameters", "head", "lora", "all"] = "parameters"
    """Which weights are trained; `parameters`: those of the setting `parameters`."""
    learning_rate: float = 1e-4
    """AdamW step."""
    steps: int = 1
    """Optimizer steps an update."""
    buffer: int = 512
    """Labelled pairs kept, newest first."""
    replay_pairs: int = 0
    """Kept pairs that join the new ones in each step, drawn at random."""
    temperature: float = 1.0
    """Divides the utility difference in p* = σ((U(z) − U(ref)) / temperature)."""
    collect: int = 4096
    """Completions of trainers that send them one by one that are kept for the next update, the newest."""
    update_every: int = 0
    """Update by itself once so many of them are kept; 0: on POST /update alone."""

    def __post_init__(self) -> None:
        words("learning", self)
        positive("learning", steps=self.steps, buffer=self.buffer, temperature=self.temperature, collect=self.collect)
        not_negative("learning", learning_rate=self.learning_rate, replay_pairs=self.replay_pairs)
        not_negative("learning", update_every=self.update_every)
        if self.update_every > self.collect:
            raise ValueError(f"learning.update_every: wanted at most learning.collect, {self.collect}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One reward model behind HTTP, for trainers in other processes and on other machines."""

    reward_model: str = ""
    """Folder or hub id of a sequence classifier with one output."""
    tokenizer: str = ""
    """Folder or hub id of its tokenizer; empty: the reward model's."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of its weights."""
    input: Literal["chat", "pair", "reply"] = "chat"
    """What it reads: messages by its chat template, and a text with the completion right behind; both as a pair of
    texts; or the completion alone."""
    max_tokens: int = 0
    """Its inputs are cut at this many tokens; 0: at its context."""
    penalty: PenaltyKind = "practical"
    """The steering penalty."""
    gamma: float = 1.0
    """Weight of the penalty."""
    gamma_units: Literal["raw", "reward_std"] = "reward_std"
    """`raw`, as in the paper; `reward_std`: γ = 1 gives the penalty the reward's running standard deviation."""
    parameters: str = "head"
    """Weights that ∇ is over: `head`, `lora`, `all`, or comma-separated names and globs."""
    oracle: str = ""
    """`module:function` that says what completions are worth, called with prompts=[…] and completions=[…] and the
    columns of its other arguments; empty: the reward model is not trained."""
    reference: Literal["request", "group"] = "request"
    """What completions are compared with where a request does not say: `request` refuses it; `group`: the next
    completion of the same prompt in the request."""
    reply_ends: str = ""
    """Comma-separated texts that are cut off the end of what OpenRLHF sends, as <|im_end|>; special tokens of the
    reward model's tokenizer always are."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs a token."""
    port: int = 8008
    """Port to listen on; 0: a free one, which is printed."""
    token_file: str = ""
    """File that holds the token which requests must bring."""
    token_variable: str = "FPO_TOKEN"
    """Environment variable that holds it where there is no `token_file`; requests need none where it is empty."""
    state: str = ""
    """Folder that keeps what was learnt over restarts; empty: nothing is kept."""
    drain: float = 30.0
    """Seconds that requests under way may take once the server has been told to stop."""
    seed: int = 0
    """Seed of sketches and of what is drawn."""
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    """How requests are scored together."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """What a request may ask."""
    learning: LearningConfig = field(default_factory=LearningConfig)
    """How the reward model is trained."""

    def __post_init__(self) -> None:
        words("", self)
        not_negative("serve", gamma=self.gamma, max_tokens=self.max_tokens, drain=self.drain)
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port: wanted 0 to 65535, got {self.port}")
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed: wanted 0 to 2**40 − 1, got {self.seed}")
        if self.learning.update_every and not self.oracle:
            raise ValueError("learning.update_every: there is nothing to learn without an oracle; wanted oracle")

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches `host`; a name but localhost is taken to be reached by others."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def token(self) -> str:
        """The token that requests must bring; empty: none.

        Raises:
            ValueError: a file without one, a token that no header can hold, or none where other machines reach the
                server.
        """
        found = os.environ.get(self.token_variable, "").strip() if self.token_variable else ""
        if self.token_file:
            try:
                found = Path(self.token_file).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"token_file: {self.token_file} cannot be read: {error}") from error
            if not found:
                raise ValueError(f"token_file: {self.token_file} is empty; wanted a token")
        if not (found.isascii() and found.isprintable()) or " " in found:
            raise ValueError("token: wanted printable ASCII without blanks")
        if not found and not self.loopback:
            told = "other machines reach it, so that requests must bring a token"
            raise ValueError(f"host: {self.host}: {told}; wanted token_file or the variable {self.token_variable}")
        return found
