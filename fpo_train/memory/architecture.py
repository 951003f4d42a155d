"""What a plan has to know of a model: its widths, read from a configuration, without weights, network or a GPU."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_train.data.sources import KNOWN, cached, resolve
from fpo_train.errors import RunError

SHIPPED = Path(__file__).parent / "architectures"
_FILES = {
    "smollm2": "smollm2",
    "minilm": "minilm",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "meta-llama/Llama-3.2-3B-Instruct": "llama-3.2-3b",
    "OpenAssistant/reward-model-deberta-v3-base": "deberta-v3-base",
}
DECODERS = ("llama", "mistral", "qwen2")
ENCODERS = ("bert", "roberta", "xlm-roberta", "deberta-v2")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Widths of a Llama-like decoder or a BERT-like encoder, and the parameters that follow from them."""

    name: str
    decoder: bool
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    """Whether the output projection is the embedding itself; an encoder has no output projection."""
    attention_bias: tuple[bool, bool] = (False, False)
    """Whether the query, key and value projections have a bias, and whether the output projection has."""
    other_embeddings: int = 0
    """Rows of the position and token-type tables."""
    pooler: bool = False
    """Whether a dense layer lies between the last states and the score (encoders)."""
    relative: bool = False
    """Whether attention scores are made by hand, with relative positions (DeBERTa)."""

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block multiplies a gate and an up projection."""
        return self.decoder

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """A layer's linear maps by name, (inputs, outputs)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        maps = {"q_proj": (self.hidden, q), "k_proj": (self.hidden, kv), "v_proj": (self.hidden, kv)}
        maps |= {"o_proj": (q, self.hidden)}
        if self.gated:
            maps |= {"gate_proj": (self.hidden, self.intermediate)}
        return maps | {"up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden)}

    @property
    def linear_weights(self) -> int:
        """Weights of all layers' linear maps: what quantisation packs."""
        return self.layers * sum(p * q for p, q in self.linear.values())

    @property
    def embedding(self) -> int:
        """Weights of the token embedding."""
        return self.vocabulary * self.hidden

    @property
    def other_weights(self) -> int:
        """Norms, biases, positions and a pooler."""
        maps, layers = self.linear, self.layers
        if self.decoder:
            norms = (2 * layers + 1) * self.hidden
            qkv, o = self.attention_bias
            biases = qkv * sum(maps[name][1] for name in ("q_proj", "k_proj", "v_proj")) + o * self.hidden
            return norms + layers * biases
        norms = (4 * layers + 2 + 2 * self.relative) * self.hidden  # DeBERTa normalises its relative positions too
        biases = layers * sum(q for _, q in maps.values())
        pooler = self.pooler * (self.hidden + 1) * self.hidden
        return norms + biases + pooler + self.other_embeddings * self.hidden

    @property
    def output(self) -> int:
        """Weights of an output projection of its own."""
        return self.embedding if self.decoder and not self.tied else 0

    @property
    def parameters(self) -> int:
        """All weights of the language model, or of the encoder without its score head."""
        return self.linear_weights + self.embedding + self.other_weights + self.output


def architecture(name: str) -> Architecture:
    """The architecture of a model by the name that a run's configuration gives it.

    Read from a local folder's config.json, a GGUF file's metadata, the files that ship with the package, or the
    hub's cache on this machine, in this order.

    Raises:
        RunError: none of them has it, or it is of a kind that the plan cannot count.
    """
    return from_config(name, _config(name))


def scorer(model: Architecture) -> Architecture:
    """The same as a classifier: without an output projection of its own."""
    return dataclasses.replace(model, tied=True)


def from_config(name: str, config: dict[str, Any]) -> Architecture:
    """The architecture that a transformers configuration describes.

    Raises:
        RunError: a kind of model that the plan cannot count, or a width that is missing.
    """
    kind = config.get("model_type")
    if kind not in (*DECODERS, *ENCODERS):
        known = ", ".join((*DECODERS, *ENCODERS))
        raise RunError(f"model {name}: the plan counts models of type {known}, got {kind!r}")
    decoder = kind in DECODERS
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        context = int(config.get("max_position_embeddings") or 2048)
        return Architecture(
            name=name,
            decoder=decoder,
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            context=context,
            tied=bool(config.get("tie_word_embeddings", not decoder)),
            attention_bias=(bool(config.get("attention_bias")) or kind == "qwen2", bool(config.get("attention_bias"))),
            other_embeddings=0 if decoder else _tables(kind, config, context),
            pooler=not decoder,
            relative=kind == "deberta-v2",
        )
    except KeyError as missing:
        raise RunError(f"model {name}: its configuration has no {missing}") from missing


def _tables(kind: str, config: dict[str, Any], context: int) -> int:
    """Rows of an encoder's position and token-type tables."""
    types = int(config.get("type_vocab_size") or 0)
    if kind != "deberta-v2":
        return types + context
    buckets = int(config.get("position_buckets") or -1)
    return types + 2 * (buckets if buckets > 0 else context) + context * bool(config.get("position_biased_input", True))


def _config(name: str) -> dict[str, Any]:
    if (name in KNOWN and cached(name) is None) or name in _FILES:
        return json.loads((SHIPPED / f"{_FILES[name]}.json").read_text(encoding="utf-8"))
    source = resolve(name)
    if source.gguf_file:
        return _gguf(name, source.location, source.gguf_file)
    path = Path(source.location) / "config.json"
    if not path.is_file():
        path = _in_cache(source.location, source.revision)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"model {name}: its config.json cannot be read: {error}") from error


def _gguf(name: str, folder: str, file: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, gguf_file=file).to_dict()
    except Exception as error:  # of the reader's own, over a file cut short of all kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"model {name}: its metadata cannot be read: {first}; put the whole file back") from error


def _in_cache(identifier: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(identifier, "config.json", revision=revision)
    if not isinstance(found, str):
        raise RunError(
            f"model {identifier}: no configuration of it is at hand; fetch the model, or name its folder or one of "
            f"{', '.join(_FILES)}"
        )
    return Path(found)
