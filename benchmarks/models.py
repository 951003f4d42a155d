"""Llama-type reward models of known shapes with random weights, and token batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fpo_kernels.testing import ragged

PAD, VOCABULARY = 0, 1024  # embeddings are never chosen, so their number does not matter

Batch = dict[str, Tensor]

# What one block is made of: width, MLP width, query heads, key heads.
SHAPES = {
    "smollm2-135m": (576, 1536, 9, 3),
    "llama3.2-1b": (2048, 8192, 32, 8),
    "llama3.2-3b": (3072, 8192, 24, 8),
    "llama3.1-8b": (4096, 14336, 32, 8),
    "tiny": (48, 96, 3, 1),  # for tests
    "narrow": (16, 32, 2, 1),  # arithmetic takes next to nothing: what is left is the host
}


def reward_model(shape: str, layers: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """Some layers of the blocks of SHAPES[shape] under a scalar head; frozen, eval."""
    config = _described(shape, layers, VOCABULARY)
    config.num_labels = 1
    config.use_cache = False
    return _made(LlamaForSequenceClassification, config, dtype, device, seed)


def language_model(
    shape: str, layers: int, vocabulary: int, dtype: torch.dtype, device: torch.device, nf4: bool = False, seed: int = 0
) -> nn.Module:
    """The same blocks under an output projection of its own; frozen, eval.

    `nf4`: their linear maps in 4 bits, as bitsandbytes packs them with double quantisation.
    """
    model = _made(LlamaForCausalLM, _described(shape, layers, vocabulary), dtype, device, seed)
    if nf4:
        _quantise(model.model, dtype)
        model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def _described(shape: str, layers: int, vocabulary: int) -> LlamaConfig:
    hidden, feed_forward, query_heads, key_heads = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=key_heads,
        pad_token_id=PAD,
    )


def _made(kind: type, config: LlamaConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """Weights are made in `dtype` and on the device: no more memory than having them, and seconds for minutes."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(seed)
            model = kind(config)
    finally:
        torch.set_default_dtype(usual)
    return model.to(dtype=dtype, device=device).eval().requires_grad_(False)


def _quantise(model: nn.Module, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if type(layer) is nn.Linear:
                with torch.device("meta"):
                    packed = bnb.nn.Linear4bit(
                        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                    )
                weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                packed.weight = weight.to(layer.weight.device)  # which packs it
                setattr(owner, name, packed.eval())


def token_batch(examples: int, tokens: int, device: torch.device, seed: int = 0, *, full: bool = False) -> Batch:
    """Random sequences padded on the right, input_ids and attention_mask (B, T) int64.

    From one token, in the middle of the batch, to all `tokens` of them; or full-length ones, the same but for padding.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(PAD + 1, VOCABULARY, (examples, tokens), generator=generator)
    lengths = [tokens] * examples if full else ragged(examples, tokens, 1, "middle")
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.where(mask == 1, PAD).to(device), "attention_mask": mask.to(device)}


def rows(batch: Batch, chosen: slice) -> Batch:
    """Some examples of a batch."""
    return {key: value[chosen] for key, value in batch.items()}


def block_weights(model: nn.Module) -> list[str]:
    """Names of all Linear weights: those of the blocks and the score head."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
