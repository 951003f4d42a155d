"""The base loaded and tried, and a fresh adapter on it."""

from __future__ import annotations

from typing import Any

import torch

from fpo_train.config import PolicyConfig
from fpo_train.data.sources import load_causal_lm
from fpo_train.errors import RunError, about

from .adapters import POLICY, complaint, refuse_unmatched
from .base import Policy, wide
from .decoding import group_heads
from .embedding import keep_in_host
from .trial import cache_serves, examine


def load_policy(config: PolicyConfig, seed: int, device: torch.device) -> Policy:
    """Load the base once and put a fresh adapter on it, drawn from `seed`.

    Raises:
        RunError: the model cannot be loaded, `trial.examine` refuses it, or its logits are not a plain projection of
            its last hidden states.
    """
    with about("policy"):
        lm, tokenizer = load_causal_lm(config.model, getattr(torch, config.dtype), config.quantization)
    if config.quantization == "none":  # quantised weights are put where they belong while they are loaded
        lm.to(device)
    lm.eval().requires_grad_(False)
    if config.input_embedding == "host":
        keep_in_host(lm, config.model)
    if config.gradient_checkpointing:  # transformers checkpoints in train mode alone: while the policy learns
        checkpoint_layers(lm)
    group_heads(lm)
    where = f"policy.model {config.model}"
    examine(lm, where)
    _check_projection(lm, where)
    torch.manual_seed(seed)
    policy = Policy(add_adapter(lm, config), tokenizer)
    policy.caches = cache_serves(lm, where, policy)
    return policy


def checkpoint_layers(lm: Any) -> None:
    """Let a model compute its layers again in the backward pass, by the name that its transformers has for it."""
    if hasattr(lm, "activation_checkpointing_enable"):
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def add_adapter(lm: Any, config: PolicyConfig) -> Any:
    """A PEFT model with a fresh LoRA adapter, its factors in fp32.

    Raises:
        RunError: a name in `policy.lora_targets` that no layer of the model has, or layers that are not linear.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(lm, lora)
    except ValueError as error:
        raise RunError(f"policy.lora_targets {list(config.lora_targets)}: {complaint(error)}") from error
    if any(".lora_embedding_" in name for name, _ in model.named_parameters()):
        raise RunError(f"policy.lora_targets {list(config.lora_targets)}: an embedding is no linear layer")
    refuse_unmatched(model, POLICY, config.lora_targets, "policy.lora_targets")
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    model.peft_config[POLICY].base_model_name_or_path = config.model  # as the user named it
    return model


@torch.no_grad()
def _check_projection(lm: Any, where: str) -> None:
    """Guard the short cut logits = W·hidden: models that scale or cap their logits must not pass in silence."""
    ids = torch.tensor([[1, 2, 3]], device=lm.device)
    whole = wide(lm(input_ids=ids).logits)
    short = wide(lm.get_output_embeddings()(lm.base_model(input_ids=ids).last_hidden_state))
    if not torch.allclose(whole, short, rtol=1e-3, atol=1e-3):
        raise RunError(f"{where}: its logits are not a plain projection of its hidden states")
