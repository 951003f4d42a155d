"""Small random instances of many architectures, and the truth about them: one autograd call an example.

Every parameter is drawn at random, norm weights and biases too: what starts at one or zero would hide a
forgotten factor. The truth runs each example alone, as the row it is in the batch, padding included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 37
LENGTHS = (5, 1, 9, 3)


Batch = dict[str, Tensor]


def logit(returned: Any, batch: Batch) -> Tensor:
    """What the engine takes by default."""
    return returned.logits[:, 0]


def echo(returned: Any, batch: Batch) -> Tensor:
    """A causal model's log-probability of saying each token again: every position and the whole head count."""
    said = returned.logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None])[..., 0]  # (B, T)
    return (said * batch["attention_mask"]).sum(1)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to build a small instance, and what its batches look like."""

    build: Callable[[], nn.Module]
    pad: int = 0
    segments: bool = False  # takes token_type_ids
    # Agreement with the float64 loop. Normalising or rotating in fp32 costs nothing, both sides share the roundings;
    # Gemma also sums its norm weights' gradients over tokens in fp32, so there autograd itself rounds at 1e-7.
    exact: float = 1e-10
    output: Callable[..., Tensor] = logit

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """A random instance in eval mode, its parameters rounded to `dtype`."""
        torch.manual_seed(seed)
        return scatter(self.build(), seed).to(dtype).eval()

    def batch(
        self, lengths: tuple[int, ...] = LENGTHS, seed: int = 0, side: str = "right", width: int | None = None
    ) -> Batch:
        """Random tokens; the longest row attends to a pad id in its middle, as texts that hold the token do."""
        generator = torch.Generator().manual_seed(seed)
        width = width or max(lengths)
        ids = torch.full((len(lengths), width), self.pad)
        mask = torch.zeros(len(lengths), width, dtype=torch.long)
        for row, n in enumerate(lengths):
            where = slice(0, n) if side == "right" else slice(width - n, width)
            ids[row, where] = torch.randint(2, VOCABULARY, (n,), generator=generator)
            mask[row, where] = 1
            if n == max(lengths) and n > 2:
                ids[row, where.start + n // 2] = self.pad
        made = {"input_ids": ids, "attention_mask": mask}
        if self.segments:
            made["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator) * mask
        return made


def scatter(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter in float64: matrices N(0, 0.3²), vectors moved by N(0, 0.3²) from where they start."""
    model = model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model


class Truth(NamedTuple):
    """Outputs (B,) and every example's gradient, flattened and concatenated in the order of `names`, (B, N)."""

    outputs: Tensor
    rows: Tensor
    names: list[str]

    def gram(self, other: Truth | None = None) -> Tensor:
        return self.rows @ (other or self).rows.T

    def norms(self) -> Tensor:
        return self.rows.square().sum(1)

    def steering(self, references: Truth, partner: list[int]) -> Tensor:
        return (self.rows * (self.rows - references.rows[partner])).sum(1)

    def direction(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return self.rows @ torch.cat([vectors[name].flatten().double() for name in self.names])


def truth(
    model: nn.Module,
    batch: Batch,
    output: Callable[..., Tensor] = logit,
    chosen: Callable[[str], bool] = lambda name: True,
) -> Truth:
    """One forward and one autograd call an example, each row of the batch alone, in the model's own dtype.

    A parameter that an example's output does not depend on has a zero gradient. The model is not touched.
    """
    model = copy.deepcopy(model)
    wanted = {name: p for name, p in model.named_parameters() if chosen(name)}
    for name, p in model.named_parameters():
        p.requires_grad_(name in wanted)
    outputs, rows = [], []
    for i in range(len(batch["input_ids"])):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        with torch.enable_grad():
            scalar = output(model(**alone), alone)[0]
        found = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True, materialize_grads=True)
        outputs.append(scalar.detach().double())
        rows.append(torch.cat([g.flatten().double() for g in found]))
    return Truth(torch.stack(outputs), torch.stack(rows), list(wanted))


def random_direction(model: nn.Module, names: list[str], seed: int = 0) -> dict[str, Tensor]:
    """N(0, 1) numbers for the named parameters, in each one's dtype."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    return {
        name: torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64).to(parameters[name].dtype)
        for name in names
    }


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.detach().double() - wanted).norm() / wanted.norm())


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "num_labels": 1,
    "pad_token_id": 0,
}


def made(
    family: str, config: str = "", task: str = "SequenceClassification", **options: Any
) -> Callable[[], nn.Module]:
    """A builder of transformers' `<family>For<task>`, with one label where it classifies."""

    def build() -> nn.Module:
        configuration = getattr(transformers, f"{config or family}Config")(**{**SIZES, **options})
        return getattr(transformers, f"{family}For{task}")(configuration)

    return build


def lora_over(base: nn.Module, **options: Any) -> nn.Module:
    """Factors of rank 4 on a Llama's attention and MLP; further options go to `peft.LoraConfig`."""
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options))


def lora(**options: Any) -> Callable[[], nn.Module]:
    """A builder of a Llama under LoRA."""
    return lambda: lora_over(made("Llama", **LLAMA)(), **options)


LLAMA = {"num_key_value_heads": 2}
SILENT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so that train mode is eval mode
DEBERTA = {
    "relative_attention": True,
    "share_att_key": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 4,  # a table of 8 rows: eight examples look just like it
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
MODERN = {"global_attn_every_n_layers": 2, "local_attention": 4, **dict.fromkeys(("bos_token_id", "eos_token_id"), 2)}
MODERN |= {"cls_token_id": 2, "sep_token_id": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 24, "bos_token_id": 2, "eos_token_id": 2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GEMMA = {"num_key_value_heads": 2, "head_dim": 4}
GEMMA2 = {**GEMMA, "query_pre_attn_scalar": 4}

ZOO = {
    "llama": Architecture(build=made("Llama", **LLAMA)),
    "llama_lora": Architecture(build=lora()),
    "llama_tied": Architecture(build=made("Llama", task="CausalLM", tie_word_embeddings=True, **LLAMA), output=echo),
    "bert": Architecture(build=made("Bert", **SILENT), segments=True),
    "roberta": Architecture(build=made("Roberta", pad_token_id=1), pad=1),
    "xlm_roberta": Architecture(build=made("XLMRoberta", pad_token_id=1), pad=1),
    "deberta_v2": Architecture(build=made("DebertaV2", **DEBERTA)),
    "modernbert": Architecture(build=made("ModernBert", **MODERN)),
    "gpt2": Architecture(build=made("GPT2", **GPT2), segments=True),
    "albert": Architecture(build=made("Albert", embedding_size=8), segments=True),
    "electra": Architecture(build=made("Electra", embedding_size=8), segments=True),
    "opt": Architecture(build=made("OPT", ffn_dim=24, word_embed_proj_dim=8, pad_token_id=1), pad=1),
    "qwen3": Architecture(build=made("Qwen3", head_dim=4, **LLAMA)),
    "gemma": Architecture(build=made("Gemma", **GEMMA), exact=1e-7),
    "gemma2": Architecture(build=made("Gemma2", **GEMMA2), exact=1e-7),
    "gemma3": Architecture(build=made("Gemma3Text", **GEMMA2, sliding_window=4), exact=1e-7),
}
