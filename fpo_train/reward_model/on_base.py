"""Reward models on the policy's own base: one copy of the weights, beneath a score head of their own.

Trained on preferences alone, a bias would cancel in every difference, so the head has none: r = w·h(z), where h is the
last hidden state at the row's last token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fpo_train.config import RunConfig
from fpo_train.config.seeds import mix
from fpo_train.data.limits import rows_of
from fpo_train.data.turns import Talk
from fpo_train.errors import RunError
from fpo_train.policy import Policy
from fpo_train.policy.adapters import POLICY, REWARD, active, complaint, refuse_unmatched
from fpo_train.processes import Ranks
from fpo_train.rollout import Readings, Said, sampled
from fpo_train.rollout import rows_of as texts_of

from .base import Reading, RewardModel, Scores
from .inputs import TextInputs

if TYPE_CHECKING:
    from .replay import Pair


class ScoredBase(nn.Module):
    """r = w·h of token batches, with one of the policy's adapters active, or none."""

    def __init__(self, policy: Policy, adapter: str | None) -> None:
        super().__init__()
        width = policy.lm.config.get_text_config().hidden_size
        exact = policy.lm.get_input_embeddings().weight.dtype == torch.float64
        self.body = policy.lm.base_model
        self.score = nn.Linear(
            width, 1, bias=False, device=policy.device, dtype=torch.float64 if exact else torch.float32
        )
        nn.init.zeros_(self.score.weight)
        self._adapter = adapter
        self._whole = [policy.model]  # in a list, so that it is no submodule

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Scores:
        """(R, T) int64 each, padded on the right."""
        with active(self._whole[0], self._adapter):
            hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(1) - 1
        closing = hidden[torch.arange(len(last), device=last.device), last]
        return Scores(self.score(closing.to(self.score.weight.dtype)))


class HeadRewardModel(RewardModel):
    """A head on the frozen base: ∇r(z) = h(z) over what is trained, and h is computed once for good."""

    adapter: str | None = None

    def __init__(self, policy: Policy, config: RunConfig, processes: Ranks) -> None:
        module = ScoredBase(policy, self.adapter)
        settings = config.reward_model
        self._policy = policy
        self._base_name = policy.base_name
        self._texts = None
        if settings.input != "chat":
            longest = min(settings.max_tokens or policy.context, policy.context)
            kind, rows = settings.input, rows_of(policy.lm)
            self._texts = TextInputs(policy.tokenizer, kind, longest, policy.eos, rows, policy.eos)
        elif settings.max_tokens:
            raise RunError("reward_model.max_tokens: on the policy's base the input `chat` is read whole; wanted 0")
        super().__init__(module, module.score, self._trained(module), config, processes)

    def read(self, rollout: Said, readings: Readings, rows_at_once: int = 0) -> Reading:
        """See `RewardModel`. With `chat` the states are those that the oracle's reading of the rollout gave."""
        if self._texts is None:
            sequences = sampled(rollout).sequences
            batch = {"input_ids": sequences.ids, "attention_mask": sequences.mask.long()}
            return Reading(batch, readings.of().closing if self.adapter is None else None)
        return self._read(self._texts.batch(texts_of(rollout), self.device), rows_at_once)

    def check(self, texts: Sequence[tuple[Talk, str]]) -> None:
        """See `RewardModel`."""
        if self._texts is not None:
            self._texts.check(texts)

    def read_pairs(self, pairs: Sequence[Pair], rows_at_once: int = 0) -> Reading:
        """See `RewardModel`."""
        prompts = [pair.prompt for pair in pairs for _ in range(2)]
        if self._texts is None:
            replies = [list(tokens) for pair in pairs for tokens in (pair.chosen, pair.reference)]
            sequences = self._policy.sequences(prompts, replies)
            batch = {"input_ids": sequences.ids, "attention_mask": sequences.mask.long()}
        else:
            texts = [text for pair in pairs for text in (pair.chosen_text, pair.reference_text)]
            rows = [(prompt.talk, text) for prompt, text in zip(prompts, texts, strict=True)]
            batch = self._texts.batch(rows, self.device)
        known = [row for pair in pairs for row in pair.features or ()]
        if self.adapter is None and len(known) == 2 * len(pairs):
            return Reading(batch, torch.stack(known).to(self.device))
        return self._read(batch, rows_at_once)

    def save(self, folder: str | Path) -> None:
        """Write the head as `score.weight`, the name of transformers' sequence classifiers, and what it sits on."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"score.weight": self.head.weight.detach().cpu().contiguous()}, folder / "head.safetensors")
        reads = {
            "chat": "last hidden state at the closing token",
            "pair": "last hidden state behind prompt and reply",
            "reply": "last hidden state behind the reply alone",
            "written": "last hidden state behind prompt and reply as written",
        }
        description = {
            "base": self._base_name,
            "adapter": self.adapter,
            "reads": reads[self.config.input],
            "hidden": self.head.in_features,
        }
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def _read(self, batch: dict[str, Tensor], rows_at_once: int) -> Reading:
        reading = Reading(batch, None)
        return Reading(batch, self.head_inputs(reading, rows_at_once)) if self.adapter is None else reading

    def _trained(self, module: ScoredBase) -> list[str]:
        return ["score.weight"]

    def _is_own(self, name: str) -> bool:
        if f".{POLICY}." in name:
            return False
        return ".lora_" not in name or (self.adapter is not None and f".{REWARD}." in name)


class AdapterRewardModel(HeadRewardModel):
    """A LoRA adapter of its own on the frozen base, and a head."""

    adapter = REWARD

    def __init__(self, policy: Policy, config: RunConfig, processes: Ranks) -> None:
        from peft import LoraConfig

        settings = config.reward_model
        flags = [(p, p.requires_grad) for p in policy.model.parameters()]
        if REWARD in policy.model.peft_config:  # of a run that began from the same base before
            policy.model.delete_adapter(REWARD)
        lora = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(settings.lora_targets)
        )
        devices = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(mix("reward adapter", config.seed))
            try:
                policy.model.add_adapter(REWARD, lora)
            except ValueError as error:
                found = list(settings.lora_targets)
                raise RunError(f"reward_model.lora_targets {found}: {complaint(error)}") from error
        refuse_unmatched(policy.model, REWARD, settings.lora_targets, "reward_model.lora_targets")
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name, parameter in policy.model.named_parameters():
            if f".{REWARD}." in name:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
                parameter.requires_grad_(True)
        super().__init__(policy, config, processes)

    def save(self, folder: str | Path) -> None:
        """Write the adapter as PEFT does, and the head beside it."""
        super().save(folder)
        self._policy.model.save_pretrained(folder, selected_adapters=[REWARD], save_embedding_layers=False)

    def _trained(self, module: ScoredBase) -> list[str]:
        return [name for name, _ in module.named_parameters() if f".{REWARD}." in name] + ["score.weight"]
