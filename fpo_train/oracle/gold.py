"""A frozen reward model as the oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fpo_train.config import RunConfig
from fpo_train.data.adapters import same_model
from fpo_train.data.limits import alike, check_tokens, context_of, oversized, rows_of
from fpo_train.data.prompts import Serves, chat
from fpo_train.data.sources import load_sequence_classifier
from fpo_train.data.turns import Talk, messages_of, plain
from fpo_train.errors import RunError, about
from fpo_train.policy import Policy
from fpo_train.rollout import Readings, Said

from .base import UtilityOracle

SETTING = "oracle.model"
ROUNDING = 1e-3  # what batches may change of a score, relative to it


class HeadOracle(UtilityOracle):
    """U(z) = w·h(z) with the head that a run saved, on the frozen base this run has already loaded.

    h is the base's last hidden state at the reply's closing token, as the head was trained on.
    """

    local = from_readings = True

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        """Raises: RunError: the head is damaged, or sits on another base than the policy's."""
        super().__init__(config.oracle.temperature)
        folder = Path(config.oracle.model).expanduser()
        base = _description(folder)["base"]
        if not same_model(base, policy.base_name):
            given = config.policy.model
            own = f"policy.model is {given}" if given == policy.base_name else f"{given} sits on {policy.base_name}"
            raise RunError(f"oracle.model: {folder} sits on {base}, but {own}")
        width = policy.lm.config.hidden_size
        try:
            weight = load_file(folder / "head.safetensors")["score.weight"]
        except (OSError, SafetensorError, KeyError) as error:
            raise RunError(
                f"oracle.model: {folder} has no score.weight in its head.safetensors, or that is cut short"
            ) from error
        if weight.shape != (1, width):
            raise RunError(f"oracle.model: {folder} has a head of shape {tuple(weight.shape)}; wanted {(1, width)}")
        self._weight = weight[0].float().to(policy.device)
        self.loaded = nn.ParameterList([nn.Parameter(self._weight, requires_grad=False)]), None

    @torch.no_grad()
    def utility(self, rollout: Said, readings: Readings, rows: Tensor) -> Tensor:
        """U of rows (n,), fp32 (n,)."""
        return self._count(readings.of(rows).closing @ self._weight, silent="not_a_number")


class ClassifierOracle(UtilityOracle):
    """U(z) = the one logit of a frozen sequence classifier, dropout off, in fp32.

    It reads the prompt as a user's turn and the reply as the assistant's, rendered by its tokenizer's chat template,
    or both as a pair of texts where there is no template. A pair that it cannot read has no utility (NaN): one that
    is too long for it, or holds a token that its embedding has no row for.
    """

    local = True

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        """Raises: RunError: the model cannot be loaded, has not exactly one output, or no trained head."""
        super().__init__(config.oracle.temperature)
        with about("oracle"):
            self._model, self._tokenizer, trained = load_sequence_classifier(config.oracle.model, torch.float32)
        if not trained:
            wanted = "wanted a trained reward model"
            raise RunError(f"{SETTING} {config.oracle.model}: its files hold no score head; {wanted}")
        self._model.to(policy.device).eval().requires_grad_(False)
        self.loaded = self._model, self._tokenizer
        self._context = min(context_of(self._model) or math.inf, self._tokenizer.model_max_length)
        self._rows = rows_of(self._model)
        # Decoders find a row's last token by the model's own pad id, whatever the tokenizer pads with.
        pad = self._model.config.get_text_config().pad_token_id
        self._pad = pad if pad is not None and 0 <= pad < self._rows else None
        self._serves = Serves(self._tokenizer, SETTING, "assistant")
        self._serves("Is this read?", "a prompt")

    def check(self, prompts: Sequence[Talk]) -> None:
        """See `Oracle`. Only a tokenizer with more tokens than the model has rows can bring one that has none."""
        for prompt in prompts if self._tokenizer.chat_template is not None else ():
            self._serves(prompt, f"the prompt {plain(prompt)!r:.80}")
        for prompt in prompts if oversized(self._tokenizer, self._rows) else prompts[:1]:
            ids = self._tokens(prompt, "Yes.")["input_ids"]
            check_tokens(ids, self._rows, self._tokenizer, f"the prompt {plain(prompt)!r:.80}", SETTING)
        if self._pad is not None and not self._knows_padding():
            self._pad = None  # so that it reads one text at a time

    def _knows_padding(self) -> bool:
        """Whether it scores a text beside a longer one as it does alone (XLNet reads a row's last token, whatever)."""
        tried = [self._tokens("One?", "Two."), self._tokens("One, or another?", "Two, and some more than that.")]
        if any(self._fault(one["input_ids"]) for one in tried):
            return True
        device = self._model.device
        alone = torch.cat([self._score([one], device) for one in tried])
        return alike(self._score(tried, device)[:, None], alone[:, None], ROUNDING)

    @torch.no_grad()
    def _score(self, inputs: list[Any], device: torch.device) -> Tensor:
        return self._model(**self._batch(inputs, device)).logits[:, 0].float()

    def utility(self, rollout: Said, readings: Readings, rows: Tensor) -> Tensor:
        """U of rows (n,), fp32 (n,), at most the readings' `rows_at_once` in a forward."""
        inputs = [self._tokens(rollout.talk(row), rollout.texts[row]) for row in rows.tolist()]
        faults = [self._fault(one["input_ids"]) for one in inputs]
        fits = [n for n, fault in enumerate(faults) if not fault]
        fits.sort(key=lambda n: len(inputs[n]["input_ids"]))  # rows of like length share a forward
        at_once = 1 if self._pad is None else readings.rows_at_once or max(len(fits), 1)
        utility = torch.full((len(inputs),), math.nan, device=rows.device)
        for start in range(0, len(fits), at_once):
            some = fits[start : start + at_once]
            utility[torch.tensor(some, device=rows.device)] = self._score([inputs[n] for n in some], rows.device)
        self.counts.update(fault for fault in faults if fault)
        read = torch.tensor(fits, dtype=torch.long, device=rows.device)
        utility[read] = self._count(utility[read], silent="not_a_number")
        return utility

    def _fault(self, ids: list[int]) -> str:
        """Why a text cannot be read, as it is counted; empty where it can."""
        if not ids:
            return "empty"
        return "too_long" if len(ids) > self._context else "unknown_token" if max(ids) >= self._rows else ""

    def _batch(self, inputs: list[Any], device: torch.device) -> dict[str, Tensor]:
        """The inputs padded on the right: token types and the mask with 0, tokens with the model's own pad id."""
        batch = {}
        for name in inputs[0]:
            fill = self._pad or 0 if name == "input_ids" else 0
            rows = [torch.tensor(one[name]) for one in inputs]
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill).to(device)
        return batch

    def _tokens(self, prompt: Talk, reply: str) -> Any:
        if self._tokenizer.chat_template is None:
            return self._tokenizer(plain(prompt), reply)
        return chat(self._tokenizer, messages_of(prompt, reply), SETTING, return_dict=True)


def load_gold(policy: Policy, config: RunConfig) -> UtilityOracle:
    """The head or the classifier in `oracle.model`.

    Raises:
        RunError: it cannot be loaded.
    """
    folder = Path(config.oracle.model).expanduser()
    if not (folder / "head.safetensors").is_file():
        return ClassifierOracle(policy, config)
    if any(folder.rglob("adapter_model.safetensors")):
        raise RunError(
            f"oracle.model: {folder} is a head on an adapter; wanted a head on the frozen base or a whole classifier"
        )
    return HeadOracle(policy, config)


def _description(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {"base": str(found["base"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f'oracle.model: {folder} has no config.json that names its "base"') from error
