"""A reward model of SmolLM2's shape with random weights, and token batches for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

PAD, VOCABULARY = 0, 1024  # embeddings are never chosen, so their number does not matter

Batch = dict[str, Tensor]


def reward_model(layers: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """SmolLM2-135M's blocks (hidden 576, MLP 1536, 9 query and 3 key heads) under a scalar head; frozen, eval."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        pad_token_id=PAD,
        use_cache=False,
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForSequenceClassification(config)
    return model.to(dtype=dtype, device=device).eval().requires_grad_(False)


def token_batch(examples: int, tokens: int, device: torch.device, seed: int = 0) -> Batch:
    """`examples` full-length random sequences, input_ids and attention_mask (B, T) int64."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(PAD + 1, VOCABULARY, (examples, tokens), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rows(batch: Batch, chosen: slice) -> Batch:
    """Some examples of a batch."""
    return {key: value[chosen] for key, value in batch.items()}


def block_weights(model: nn.Module) -> list[str]:
    """Names of all Linear weights: those of the blocks and the score head."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
