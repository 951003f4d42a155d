"""The base loaded and tried, and an adapter on it: a fresh one, or the one that the run begins on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from fpo_train.config import PolicyConfig
from fpo_train.data.adapters import WEIGHTS, Adapter, adapter_at, settled, tokenizer_of
from fpo_train.data.limits import rows_of
from fpo_train.data.sources import closing, load_causal_lm
from fpo_train.errors import RunError, about

from .adapters import POLICY, complaint, of_base, refuse_unfit, refuse_unmatched
from .base import Policy, wide
from .decoding import group_heads
from .embedding import keep_in_host
from .trial import cache_serves, examine

STEPS = 3  # that `load_policy` tells of


def load_policy(
    config: PolicyConfig, seed: int, device: torch.device, told: Callable[[str], None] = lambda step: None
) -> Policy:
    """Load the base once and put an adapter on it: that of `config.model`, or a fresh one, drawn from `seed`.

    `told` is called with each of `STEPS` steps, when it is done.

    Raises:
        RunError: the model cannot be loaded, `trial.examine` refuses it, its logits are not a plain projection of
            its last hidden states, or an adapter that does not fit its base.
    """
    config = settled(config)
    with about("policy"):
        adapter = adapter_at(config.model)
        lm, tokenizer = _load(config, adapter)
    if config.quantization == "none":  # quantised weights are put where they belong while they are loaded
        lm.to(device)
    lm.eval().requires_grad_(False)
    base = adapter.base if adapter else config.model
    told("read")
    if config.input_embedding == "host":
        keep_in_host(lm, base)
    if config.gradient_checkpointing:  # transformers checkpoints in train mode alone: while the policy learns
        checkpoint_layers(lm)
    group_heads(lm)
    where = f"policy.model {base}"
    examine(lm, where)
    _check_projection(lm, where)
    told("rows compared")
    torch.manual_seed(seed)
    model = take_up(lm, adapter) if adapter else add_adapter(lm, config)
    policy = Policy(model, tokenizer)
    policy.caches = cache_serves(lm, where, policy)
    told("cache compared")
    return policy


def _load(config: PolicyConfig, adapter: Adapter | None) -> tuple[Any, Any]:
    """The whole model and the tokenizer of a policy."""
    dtype = getattr(torch, config.dtype)
    if adapter is None:
        return load_causal_lm(config.model, dtype, config.quantization)
    try:
        lm, tokenizer = load_causal_lm(adapter.base, dtype, config.quantization)
    except RunError as error:
        raise RunError(f"model {config.model}: its base, {error}") from error
    return lm, closing(config.model, tokenizer_of(adapter, tokenizer), rows_of(lm))


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
    from peft import LoraConfig

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    model = _put_on(lm, lora, config.model, f"policy.lora_targets {list(config.lora_targets)}")
    refuse_unmatched(model, POLICY, config.lora_targets, "policy.lora_targets")
    return model


def take_up(lm: Any, adapter: Adapter) -> Any:
    """A PEFT model that goes on with an adapter: its own settings and factors, these in fp32.

    Raises:
        RunError: weights that do not fit the model, or are not finite numbers.
    """
    from dataclasses import fields

    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    where = f"policy.model {adapter.name}: it does not fit its base {adapter.base}"
    known = {field.name for field in fields(LoraConfig) if field.init}
    asked = {key: value for key, value in adapter.settings.items() if key in known and value is not None}
    plain = {"init_lora_weights": True, "inference_mode": False, "task_type": "CAUSAL_LM", "eva_config": None}
    given = load_file(adapter.folder / WEIGHTS)
    base = of_base(lm, given)
    model = _put_on(lm, LoraConfig(**{**asked, **plain}), adapter.base, where)
    refuse_unfit(model, POLICY, given, base, where)
    factors = {name: weight for name, weight in given.items() if name not in base}
    if lost := [name for name, weight in factors.items() if not bool(weight.isfinite().all())]:
        raise RunError(f"policy.model {adapter.name}: {lost[0]} holds numbers that are not finite")
    set_peft_model_state_dict(model, factors, adapter_name=POLICY)
    return model


def _put_on(lm: Any, lora: Any, base: str, where: str) -> Any:
    """The model with an adapter of these settings, whose base is known by that name; factors in fp32."""
    from peft import get_peft_model

    lora.base_model_name_or_path = None  # PEFT complains of another one than it would write
    try:
        with warnings.catch_warnings():  # peft asks transformers ≥ 5.24 by an old name, and every run would say so
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(lm, lora, adapter_name=POLICY)
    except ValueError as error:
        raise RunError(f"{where}: {complaint(error)}") from error
    if any(".lora_embedding_" in name for name, _ in model.named_parameters()):
        raise RunError(f"{where}: an embedding is no linear layer")
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    model.peft_config[POLICY].base_model_name_or_path = base  # as the user named it
    return model


@torch.no_grad()
def _check_projection(lm: Any, where: str) -> None:
    """Guard the short cut logits = W·hidden: models that scale or cap their logits must not pass in silence."""
    ids = torch.tensor([[1, 2, 3]], device=lm.device)
    whole = wide(lm(input_ids=ids).logits)
    short = wide(lm.get_output_embeddings()(lm.base_model(input_ids=ids).last_hidden_state))
    if not torch.allclose(whole, short, rtol=1e-3, atol=1e-3):
        raise RunError(f"{where}: its logits are not a plain projection of its hidden states")
