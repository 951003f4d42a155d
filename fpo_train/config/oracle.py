"""Settings of the oracle. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import not_negative, of_kind, positive, words

TOLD = {
    "base": "how likely the frozen base model finds a reply",
    "gold": "the frozen reward model {model}",
    "function": "the function {function}",
    "judge": "the judge {model}",
    "file": "people's preferences in {file}",
}
"""Who the oracle of a kind is, in words, its settings in braces."""


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """Who says which reply is better: the soft label p* of a reply against its reference."""

    kind: Literal["base", "gold", "function", "judge", "file"] = "base"
    """`base`: the base model's mean log-likelihood of the reply; `gold`: a frozen reward model; `function`: your
    Python; `judge`: an OpenAI-compatible endpoint; `file`: human preferences."""
    temperature: float = 1.0
    """Divides the utility difference in p* = σ((U(z) − U(ref)) / temperature); 1 as in the paper."""
    offset: float = 0.0
    """`base`: U = offset + mean log-likelihood in nats a token (the paper: 5)."""
    utility_range: tuple[float, float] | None = None
    """`base`: U is cut to this range (the paper: −15 to 5)."""
    mean_over: Literal["reply", "padded"] = "reply"
    """`base`: the mean is over the reply's own tokens, or over padding too (the paper)."""
    quantization: Literal["none", "int8"] = "none"
    """`base`: int8 loads a second copy of the base in 8 bits (the paper); none shares the policy's."""
    model: str = ""
    """`gold`: its folder or hub id; `judge`: the name of the model to ask."""
    function: str = ""
    """`function`: `module:function`, called with prompts=[…] and completions=[…], or by place; returns utilities."""
    file: str = ""
    """`file`: with prompt, chosen, rejected and optionally preference in [0, 1] a row; formats as of `data.prompts`."""
    url: str = ""
    """`judge`: the endpoint, up to and with /v1."""
    key_variable: str = "OPENAI_API_KEY"
    """`judge`: environment variable that holds the key."""
    cache: str = ""
    """`judge`: file that keeps its answers; empty: `judge.jsonl` in the run's folder."""
    requests_per_minute: float = 600.0
    """`judge`: the most it is asked."""
    concurrency: int = 8
    """`judge`: requests under way at once."""
    retries: int = 4
    """`judge`: tries after the first, each after twice the wait of the one before."""
    timeout: float = 60.0
    """`judge`: seconds an answer may take."""

    @property
    def told(self) -> str:
        """Who it is, in words."""
        return TOLD[self.kind].format_map(vars(self))

    def __post_init__(self) -> None:
        words("oracle", self)
        positive("oracle", temperature=self.temperature, requests_per_minute=self.requests_per_minute)
        positive("oracle", concurrency=self.concurrency, timeout=self.timeout)
        not_negative("oracle", retries=self.retries)
        if self.utility_range is not None and not self.utility_range[0] < self.utility_range[1]:
            raise ValueError(f"oracle.utility_range: wanted low < high, got {list(self.utility_range)}")
        needed = {"gold": ("model",), "judge": ("model", "url"), "function": ("function",), "file": ("file",)}
        for name in needed.get(self.kind, ()):
            if not getattr(self, name):
                raise ValueError(f"oracle.{name}: oracle.kind {self.kind} needs it")
        of_kind("oracle", self.kind, model=(self.model, "gold", "judge"), function=(self.function, "function"))
        of_kind("oracle", self.kind, file=(self.file, "file"), url=(self.url, "judge"), cache=(self.cache, "judge"))
