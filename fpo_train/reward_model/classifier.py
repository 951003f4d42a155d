"""A sequence-classification model of its own as reward model: an encoder or a decoder with one score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fpo_train.config import RunConfig
from fpo_train.config.seeds import mix
from fpo_train.data.adapters import TRAINED, kept_in
from fpo_train.data.limits import alike, context_of, pad_id, rows_of
from fpo_train.data.sources import Classifier
from fpo_train.data.turns import Talk
from fpo_train.errors import RunError, about
from fpo_train.policy.adapters import REWARD, complaint, refuse_unmatched
from fpo_train.processes import Ranks
from fpo_train.rollout import Readings, Said
from fpo_train.rollout import rows_of as texts_of

from .base import Reading, RewardModel, Scores
from .inputs import TextInputs
from .kept import load_classifier, take_up

if TYPE_CHECKING:
    from .replay import Pair

FLOAT_ROUNDING, HALF_ROUNDING = 1e-3, 0.05  # what batches may change of a score head's input, relative to its norm


class LastToken(nn.Module):
    """A decoder's score at the last token that its mask shows.

    transformers' own classifiers look for the last token that is no padding by its id, which goes wrong where texts
    end with the token that pads.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body = unwrapped(model).base_model
        score = score_of(model)
        if score is None:
            raise ValueError("wanted a classifier with a linear score")
        self.score = score

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Scores:
        """(R, T) int64 each, padded on the right."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(1) - 1
        return Scores(self.score(hidden[torch.arange(len(last), device=last.device), last]))


def unwrapped(model: Any) -> Any:
    """The classifier itself, its adapters in it, of one that PEFT has wrapped."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def score_of(model: Any) -> nn.Linear | None:
    """The linear score of a decoder's classifier, as it is used: PEFT keeps a trained copy beside the first one."""
    score: Any = getattr(unwrapped(model), "score", None)
    copies = getattr(score, "modules_to_save", None)
    if copies is not None:
        score = copies[score.active_adapters[0]]
    return score if isinstance(score, nn.Linear) else None


class ClassifierRewardModel(RewardModel):
    """See the module. Where the head alone is trained, the rest runs once a text and iteration."""

    def __init__(
        self,
        config: RunConfig,
        processes: Ranks,
        device: torch.device,
        given: Classifier | None = None,
        whole: bool = False,
    ) -> None:
        """The classifier of the configuration, or one that is `given`.

        Args:
            whole: it cannot be had by its name, and is saved as a whole.

        Raises:
            RunError: it cannot be loaded, has no score head, or no layers to adapt.
        """
        settings, kept = config.reward_model, kept_in(config.reward_model.classifier)
        if kept is not None:
            kept.refuse_other(settings.train, vars(settings))
        if given is None:
            with about("reward_model"):
                given = load_classifier(settings.classifier, getattr(torch, settings.dtype))
        self._whole, tokenizer, self.comes_trained = given
        self._saved_whole = whole
        self._named = settings.classifier if kept is None else kept.model
        self._whole.requires_grad_(False)
        if not getattr(self._whole, "is_quantized", False):  # such weights lie where they were loaded to
            self._whole.to(device)
        self._tokenizer, self._frozen_body = tokenizer, settings.train == "head"
        self.loaded = self._whole, tokenizer
        module = LastToken(self._whole) if score_of(self._whole) is not None else self._whole
        heads = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if not heads:
            raise RunError(f"reward_model.model: {settings.classifier} has no linear layer with one output at its end")
        if settings.train == "lora" and not any(".lora_" in name for name, _ in self._whole.named_parameters()):
            self._add_adapter(config)
        limits = [settings.max_tokens, tokenizer.model_max_length, context_of(self._whole)]
        longest, rows = int(min(limit for limit in limits if limit)), rows_of(self._whole)
        # RoBERTa-like encoders count positions over what is not their own pad id, whatever the tokenizer pads with.
        pad = pad_id(self._whole.config.get_text_config().pad_token_id, tokenizer.pad_token_id, rows=rows)
        self._texts = TextInputs(tokenizer, settings.input, longest, rows=rows, pad=pad)
        chosen = {id(p) for p in heads[-1].parameters()}
        trained = [
            name
            for name, p in module.named_parameters()
            if settings.train == "all" or id(p) in chosen or (settings.train == "lora" and ".lora_" in name)
        ]
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        if kept is not None:
            take_up(kept, dict(module.named_parameters()), trained if kept.trained == settings.train else ())
            self.comes_trained = True
        super().__init__(module, heads[-1], trained, config, processes)

    @property
    def tokenizer(self) -> Any:
        """Its own."""
        return self._tokenizer

    def read(self, rollout: Said, readings: Readings, rows_at_once: int = 0) -> Reading:
        """See `RewardModel`."""
        return self.read_texts(texts_of(rollout), rows_at_once)

    def check(self, texts: Sequence[tuple[Talk, str]]) -> None:
        """See `RewardModel`. It also refuses a model that reads a text otherwise beside a longer one."""
        self._texts.check(texts)
        tried = [("One?", "Two."), ("One, or another?", "Two, and some more than that.")]
        together = self.head_inputs(Reading(self._texts.batch(tried, self.device), None))
        alone = [self.head_inputs(Reading(self._texts.batch([one], self.device), None)) for one in tried]
        problem = "scores every token and not the text" if together.ndim != 2 else ""
        within = FLOAT_ROUNDING if self.head.weight.element_size() >= 4 else HALF_ROUNDING
        if not problem and not alike(together, torch.cat(alone), within):
            problem = "reads padding behind a text, in spite of the mask"
        if problem:
            raise RunError(f"reward_model.model {self.config.classifier}: {problem}; wanted one score a text")

    def read_pairs(self, pairs: Sequence[Pair], rows_at_once: int = 0) -> Reading:
        """See `RewardModel`."""
        rows = [(pair.prompt.talk, text) for pair in pairs for text in (pair.chosen_text, pair.reference_text)]
        known = [row for pair in pairs for row in pair.features or ()]
        if self._frozen_body and len(known) == len(rows):
            return Reading(self._texts.batch(rows, self.device), torch.stack(known).to(self.device))
        return self.read_texts(rows, rows_at_once)

    def read_texts(self, texts: Sequence[tuple[Talk, str]], rows_at_once: int = 0) -> Reading:
        """What it reads of (prompt, reply) rows; what its head reads too, where all beneath the head is frozen."""
        reading = Reading(self._texts.batch(texts, self.device), None)
        return Reading(reading.batch, self.head_inputs(reading, rows_at_once)) if self._frozen_body else reading

    def save(self, folder: str | Path) -> None:
        """Write the model as `save_pretrained` does, or its adapter and head alone where only those are trained."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.config
        if settings.train == "all" or self._saved_whole:
            self._whole.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
            return
        trained = {name: weight.contiguous() for name, weight in self.weights().items()}
        save_file(trained, folder / TRAINED)
        description: dict[str, str | int] = {
            "model": self._named,
            "trained": settings.train,
            "reads": settings.input,
        }
        if settings.train == "lora":
            description |= {"lora_rank": settings.lora_rank, "lora_alpha": settings.lora_alpha}
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def _add_adapter(self, config: RunConfig) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        settings = config.reward_model
        lora = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(settings.lora_targets)
        )
        with torch.random.fork_rng(devices=[self._whole.device] if self._whole.device.type == "cuda" else []):
            torch.manual_seed(mix("reward adapter", config.seed))
            try:
                inject_adapter_in_model(lora, self._whole, adapter_name=REWARD)
            except ValueError as error:
                found = list(settings.lora_targets)
                raise RunError(f"reward_model.lora_targets {found}: {complaint(error)}") from error
        refuse_unmatched(self._whole, REWARD, settings.lora_targets, "reward_model.lora_targets")
