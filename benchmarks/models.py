"""Llama-type reward models of known shapes with random weights, and token batches for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from fpo_kernels.testing import ragged

PAD, VOCABULARY = 0, 1024  # embeddings are never chosen, so their number does not matter

Batch = dict[str, Tensor]

# What one block is made of: width, MLP width, query heads, key heads.
SHAPES = {
    "smollm2-135m": (576, 1536, 9, 3),
    "llama3.1-8b": (4096, 14336, 32, 8),
    "tiny": (48, 96, 3, 1),  # for tests
    "narrow": (16, 32, 2, 1),  # arithmetic takes next to nothing: what is left is the host
}


def reward_model(shape: str, layers: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """Some layers of the blocks of SHAPES[shape] under a scalar head; frozen, eval.

    Weights are made in `dtype` and on the device, so that making them takes no more memory than having them, and on
    a GPU seconds instead of minutes.
    """
    hidden, feed_forward, query_heads, key_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=key_heads,
        pad_token_id=PAD,
        use_cache=False,
    )
    config.num_labels = 1
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(seed)
            model: nn.Module = LlamaForSequenceClassification(config)
    finally:
        torch.set_default_dtype(usual)
    return model.to(dtype=dtype, device=device).eval().requires_grad_(False)


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
