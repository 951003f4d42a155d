"""Per-example reward gradients of a reward model, layer by layer, as the packed streams that operations take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fpo_kernels as fk
from benchmarks.models import PAD, Batch, reward_model, token_batch

# SmolLM2's own greedy replies to the first 16 shipped questions, cut after 8 to 100 tokens.
REPLIES = Path(__file__).parent / "replies.jsonl"


@dataclass(frozen=True)
class Layer:
    """What one linear layer's per-example gradients are made of: a (S, p), d (S, q), offsets (B+1,)."""

    name: str
    a: Tensor
    d: Tensor
    offsets: Tensor

    @property
    def block(self) -> str:
        """Where layers that read one input are neighbours: the module that the layer is in."""
        return self.name.rsplit(".", 1)[0]


def smollm2(blocks: Sequence[int], device: torch.device) -> list[Layer]:
    """The gradients of 16 real texts (a question through the chat template, a reply, the closing token) by SmolLM2.

    The reward is w·h at the closing token, w drawn from a normal distribution (seed 0): products of gradients do
    not change with the scale of w. In fp32; the seven layers of each of the `blocks`.
    """
    from fpo_train.data.prompts import read_prompts, render
    from fpo_train.data.sources import load_causal_lm

    model, tokenizer = load_causal_lm("smollm2", torch.float32)
    questions = dict(read_prompts("questions"))
    texts = []
    for line in REPLIES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reply = tokenizer(row["reply"], add_special_tokens=False)["input_ids"]
        texts.append([*render(tokenizer, questions[row["id"]]), *reply, tokenizer.eos_token_id])
    backbone: Any = model.model
    return capture(backbone.to(device), joined(texts, device), [f"layers.{n}." for n in blocks])


def tiny(device: torch.device) -> list[Layer]:
    """The same of four random texts by a random model of two blocks."""
    batch = token_batch(4, 24, device)
    model: Any = reward_model("tiny", 2, torch.float32, device)
    return capture(model.model, batch, ["layers."])


def joined(texts: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """Token ids padded on the right, with the mask that tells padding."""
    ids = torch.full((len(texts), max(map(len, texts))), PAD)
    mask = torch.zeros_like(ids)
    for n, text in enumerate(texts):
        ids[n, : len(text)] = torch.tensor(text)
        mask[n, : len(text)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def capture(backbone: Any, batch: Batch, prefixes: Sequence[str]) -> list[Layer]:
    """One forward and backward of all rewards, padding dropped: the Linear layers whose names begin so."""
    backbone.eval().requires_grad_(False)
    inputs: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[name] = given[0].detach()
            out.register_hook(lambda grad: grads.__setitem__(name, grad))

        return module.register_forward_hook(hook)

    handles = [
        watch(name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(prefixes))
    ]
    mask = batch["attention_mask"]
    embedded = backbone.get_input_embeddings()(batch["input_ids"]).requires_grad_()  # so that there is a backward
    with torch.enable_grad():
        hidden = backbone(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        closing = hidden[torch.arange(len(mask)), mask.sum(1) - 1]
        head = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(closing)
        (closing @ head).sum().backward()
    for handle in handles:
        handle.remove()
    found = []
    for name, a in inputs.items():
        rows, offsets = fk.pack(a, mask)
        found.append(Layer(name, rows, fk.pack(grads[name], mask)[0], offsets))
    return found
