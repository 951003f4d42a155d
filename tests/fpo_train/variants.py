"""Other models on the tiny one's tokenizer, in folders of their own, and what they say without any cache."""

import json
import shutil

import torch
import transformers

from fpo_train.config import PolicyConfig, RolloutConfig
from fpo_train.data.prompts import Prompt
from fpo_train.policy import load_policy
from fpo_train.rollout import sampler

PROMPTS = [Prompt(name="a", text="a", ids=tuple(range(20, 29))), Prompt(name="b", text="b", ids=(7, 40, 90))]
TOKENS = 6


def variant(tiny, folder, kind="Llama", model=None, change=None, **options):
    """A model of another kind or with other settings; `change` is called with it before it is saved."""
    own = json.loads((tiny / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "initializer_range")
    more = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    known = {name: own[name] for name in (names if "mamba" in kind.lower() else names + more)}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**known, "pad_token_id": None, **options})
    made = getattr(transformers, model or f"{kind}ForCausalLM")(config)
    if change:
        with torch.no_grad():
            change(made)
    made.save_pretrained(folder)
    for path in tiny.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def loaded(folder, **settings):
    """Its policy, adapter moved off zero."""
    policy = load_policy(PolicyConfig(model=str(folder), lora_rank=2, **settings), 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def replies(policy, **settings):
    """Of two prompts two candidates and a reference each; the likeliest tokens, unless told otherwise."""
    known = {"prompts": 2, "candidates": 2, "max_new_tokens": TOKENS, "min_new_tokens": 2, "top_k": 1, **settings}
    return sampler(policy, RolloutConfig(**known), 0)(PROMPTS, 1, 0)


def by_hand(policy, prompt, base=False, least=2):
    """The likeliest tokens, each from a plain forward of one row."""
    said = []
    while len(said) < TOKENS and not (said and said[-1] in policy.ends):
        with torch.no_grad(), policy.base() if base else policy.adapter("default"):
            logits = policy.lm(input_ids=torch.tensor([[*prompt.ids, *said]]), use_cache=False).logits[0, -1]
        if len(said) < least:
            logits[list(policy.ends)] = -torch.inf
        said.append(int(logits.argmax()))
    return said


def says_what_it_thinks(policy):
    """Assert that a rollout's replies are those of plain forwards, candidates and references."""
    wanted = []
    for prompt in PROMPTS:
        wanted += [by_hand(policy, prompt)] * 2 + [by_hand(policy, prompt, base=True)]
    rollout = replies(policy)
    assert rollout.replies == wanted
    return rollout
