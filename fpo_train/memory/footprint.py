"""Bytes that a model's layers keep and pass through: the arithmetic beneath `plan`.

Counted per pass over n tokens in rows of `width` tokens, e bytes a number. H, I, Q, K are the hidden, intermediate,
query and key widths, r the rank of an adapter. What autograd keeps of a layer follows from transformers' modules and
from which kernel attention takes: with a padding mask, PyTorch's fused kernels keep queries, keys and values (repeated
to the queries' heads), their output, one number a head, and a mask of the scores' shape in the layer's number format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fpo_train.config.units import MOST_PACKED

from .architecture import Architecture

FP32 = 4
NF4_BITS = 4 + 8 / 64 + 32 / 64 / 256  # a code a weight, an 8-bit scale a block of 64, an fp32 scale a 256 of those
INT8_ROWS = 4  # bytes of scale an output of an 8-bit matrix

Kept = Literal["frozen", "trained", "tapped"]


@dataclass(frozen=True, kw_only=True)
class Tape:
    """What a backward pass needs beside the gradients of the activations.

    Attributes:
        itemsize: bytes of a number of the model.
        targets: linear layers that carry a low-rank adapter in fp32.
        rank: its rank; 0 without one.
        dropout: whether the adapters' inputs pass through dropout.
        kept: `trained` keeps every linear layer's input for its weight's gradient, `tapped` (`fk.Influence`) too.
        remakes: `fk.Influence` makes inputs that are plain products again: gate · up, and the norms' outputs of an
            fp32 decoder.
        checkpointing: keep each layer's input alone and run the layer again.
        cuda: dropout's mask takes a byte a number there, four on a CPU.
    """

    itemsize: int
    targets: tuple[str, ...] = ()
    rank: int = 0
    dropout: bool = False
    kept: Kept = "frozen"
    remakes: bool = False
    checkpointing: bool = False
    cuda: bool = False

    def adapters(self, model: Architecture) -> float:
        """Bytes a token that the adapters of a layer keep: their inputs in fp32 and what their first factor makes."""
        maps = model.linear
        inputs = {name: p for name, (p, _) in maps.items() if _chosen(name, self.targets)}
        kept = self.rank * FP32 * len(inputs)
        if self.dropout:  # each adapter draws its own mask
            return kept + sum(inputs.values()) * (FP32 + (1 if self.cuda else FP32))
        if self.itemsize < FP32:  # each casts its input on its own
            return kept + sum(inputs.values()) * FP32
        if (self.remakes and model.decoder) or self.kept != "frozen":
            return kept  # made again, or counted with the weights beneath
        kept += model.hidden * FP32 * any(name in inputs for name in ("q_proj", "k_proj", "v_proj"))
        kept += model.hidden * FP32 * any(name in inputs for name in ("gate_proj", "up_proj"))
        # attention keeps its output anyway, which is what o_proj reads
        return kept + model.intermediate * FP32 * ("down_proj" in inputs)


def _chosen(name: str, targets: tuple[str, ...]) -> bool:
    return name in targets or "all-linear" in targets


def layer_bytes(model: Architecture, tape: Tape, tokens: int, width: int) -> float:
    """What autograd keeps of one layer."""
    e, H, I = tape.itemsize, model.hidden, model.intermediate  # noqa: E741
    Q = model.heads * model.head_dim
    whole = tape.kept != "frozen"
    attention = 4 * Q * e + model.heads * FP32 + width * e
    if model.relative:
        attention = 3 * Q * e + model.heads * width * (2 * e + 1)  # softmax and its masked scores, by hand
    remade = tape.remakes and not tape.checkpointing
    if model.decoder:
        norms = 2 * (max(e, FP32) * H + FP32) + 2 * H * e * (tape.kept == "trained")
        if tape.kept == "tapped" and e < FP32:
            norms += 2 * H * e  # their own inputs; in fp32 autograd keeps those anyway
        feed = 3 * I * e + I * e * (whole and not remade)
        inputs = 2 * H * e * (whole and not (remade and e == FP32))
    else:
        norms = 2 * (H * e + 2 * FP32)
        feed = I * e + I * e * whole
        inputs = 2 * H * e * whole
    return tokens * (attention + norms + feed + inputs + tape.adapters(model))


def tape_bytes(model: Architecture, tape: Tape, tokens: int, width: int) -> float:
    """What autograd keeps of a whole forward pass, with the layer that is run again where there is checkpointing."""
    e, H = tape.itemsize, model.hidden
    final = tokens * max(e, FP32) * H * model.decoder
    layer = layer_bytes(model, tape, tokens, width)
    mask = tokens * width  # one byte a score, made once a forward pass
    if tape.checkpointing:
        return model.layers * tokens * H * e + layer + mask
    first = tokens * max(e, FP32) * H if model.decoder and tape.kept == "frozen" else 0  # nothing learns beneath it
    return model.layers * layer - first + final + mask


def backward_bytes(model: Architecture, tape: Tape, tokens: int, quantised: int = 0) -> float:
    """The gradients that are under way at once, at their most in the feed-forward block.

    `quantised`: bytes of the largest matrix once it is unpacked, 0 where none is.
    """
    e, H, I = tape.itemsize, model.hidden, model.intermediate  # noqa: E741
    under_way = (3 + (tape.kept == "tapped" and tape.remakes) if model.gated else 2) * I * e * tokens
    return tokens * H * e + max(under_way, under_way - I * e * tokens + quantised)


def forward_bytes(model: Architecture, itemsize: int, tokens: int, width: int, quantised: int = 0) -> float:
    """What one layer passes through without a tape: the most of its feed-forward block and of its attention."""
    e, H, I = itemsize, model.hidden, model.intermediate  # noqa: E741
    Q, K = model.heads * model.head_dim, model.kv_heads * model.head_dim
    streams = 4 * H if model.decoder else 3 * H  # embeddings, the layer's input, the sum behind attention, its norm
    feed = (3 if model.gated else 2) * I * e * tokens
    feed = max(feed, feed - I * e * tokens + quantised) + streams * e * tokens
    repeated = 2 * Q if model.heads > model.kv_heads else 0
    attention = tokens * ((3 * H + 2 * Q + 2 * K + repeated) * e + width * (e + 1)) + quantised
    if model.relative:
        attention += tokens * model.heads * width * 4 * e
    return max(feed, attention)


def packed_bytes(model: Architecture) -> int:
    """A CPU's second copy of an fp32 model's matrices, arranged for decoding (`rollout.packing`)."""
    whole = (model.linear_weights + model.vocabulary * model.hidden) * FP32
    return whole if whole <= MOST_PACKED else 0


def cache_bytes(model: Architecture, itemsize: int, tokens: int) -> int:
    """Keys and values of all layers."""
    return 2 * model.layers * model.kv_heads * model.head_dim * itemsize * tokens


def weight_bytes(model: Architecture, itemsize: int, quantization: str) -> float:
    """A model's weights; quantised are its layers' linear maps, and neither embeddings nor norms nor the output."""
    rest = (model.embedding + model.other_weights + model.output) * itemsize
    if quantization == "nf4":
        return rest + model.linear_weights * NF4_BITS / 8
    if quantization == "int8":
        scales = model.layers * sum(q for _, q in model.linear.values()) * INT8_ROWS
        return rest + model.linear_weights + scales
    return rest + model.linear_weights * itemsize


def unpacked_bytes(model: Architecture, itemsize: int, quantization: str) -> int:
    """The largest matrix as it is multiplied with, where weights are quantised."""
    return 0 if quantization == "none" else itemsize * max(p * q for p, q in model.linear.values())


def adapter_weights(model: Architecture, targets: tuple[str, ...], rank: int) -> int:
    """Weights of a low-rank adapter on the named linear layers."""
    return model.layers * sum(rank * (p + q) for name, (p, q) in model.linear.items() if _chosen(name, targets))
