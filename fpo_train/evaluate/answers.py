"""Greedy answers of policies that share one copy of their base: who they are, and what they say."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fpo_train.config import EvalConfig, PolicyConfig
from fpo_train.data.adapters import base_of, words_in
from fpo_train.data.identity import of_model
from fpo_train.data.limits import check_tokens, context_of, rows_of
from fpo_train.data.prompts import check_template, render
from fpo_train.data.sources import load_causal_lm
from fpo_train.data.weights import ADAPTER_CONFIG as ADAPTER
from fpo_train.errors import RunError
from fpo_train.policy.adapters import of_base, refuse_unfit
from fpo_train.policy.generation import Greedy, end_tokens, ended, generate
from fpo_train.policy.trial import cache_serves, examine
from fpo_train.report.records import CONFIG

from .questions import Question

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FORMATS = {"dtype": ("float32", "bfloat16"), "quantization": ("none", "nf4", "int8")}


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """Who answers: a base model as it is loaded, and the folder of the adapter on it, if there is one."""

    model: str
    dtype: str
    quantization: str
    adapter: Path | None
    template: bool = True
    """False: questions are read as they are written, as the run read its prompts (`data.chat_template none`)."""

    def facts(self) -> dict[str, Any]:
        """What its answers depend on; the adapter by its content, so that it may be moved."""
        known: dict[str, Any] = {"model": self.model, "dtype": self.dtype, "quantization": self.quantization}
        known |= {} if self.template else {"chat_template": "none"}
        digest = hashlib.sha256()
        for name in (ADAPTER, *WEIGHTS) if self.adapter else ():
            if self.adapter and (self.adapter / name).is_file():
                digest.update((self.adapter / name).read_bytes())
        return known | {"adapter_sha256": digest.hexdigest() if self.adapter else None}


def find_speakers(config: EvalConfig) -> dict[str, Speaker]:
    """The policies that `config.left` and `config.right` name, by side, all on one base.

    Raises:
        RunError: a folder with neither a finished run nor an adapter in it, two bases, or a run that read its prompts
            through a chat template beside one that did not.
    """
    found = {side: _find(side, name) for side, name in config.sides.items()}
    named = {side: policy for side, (policy, adapter, _) in found.items() if adapter is not None}
    templates = {template for _, adapter, template in found.values() if adapter is not None} or {True}
    if len(templates) > 1:
        raise RunError("right: one side's run had data.chat_template none, the other's did not; wanted two that agree")
    models = {policy.model for policy in named.values()}
    if len(models) > 1 and not config.model:
        told = " and ".join(f"{side} on {policy.model}" for side, policy in named.items())
        raise RunError(f"model: {told}; name the one base that both are to be put on")
    base = next(iter(named.values()), PolicyConfig())
    return {
        side: Speaker(
            model=config.model or base.model,
            dtype=base.dtype if config.dtype == "run" else config.dtype,
            quantization=base.quantization if config.quantization == "run" else config.quantization,
            adapter=adapter,
            template=all(templates),
        )
        for side, (_, adapter, _) in found.items()
    }


def _find(side: str, name: str) -> tuple[PolicyConfig, Path | None, bool]:
    """The base as a run or an adapter names it, the adapter's folder, and whether a chat template is used."""
    if name == "base":
        return PolicyConfig(), None, True
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise RunError(f"{side}: wanted base, a run's folder or an adapter's; there is no folder {name}")
    if (folder / ADAPTER).is_file():
        return PolicyConfig(model=_base_of(side, folder)), folder, True
    if not (folder / CONFIG).is_file():
        raise RunError(f"{side}: {name} holds neither a run ({CONFIG}) nor an adapter ({ADAPTER})")
    run = _settings(side, folder / CONFIG)
    parts = [kind.strip() for kind in str(run.get("compare") or "").split(",") if kind.strip()]
    if parts:
        raise RunError(f"{side}: {name} compares several runs; name one of them, such as {folder / parts[-1]}")
    if not (folder / "policy" / ADAPTER).is_file():
        raise RunError(f"{side}: {name} has no policy/{ADAPTER}; the run has not finished")
    policy = run.get("policy")
    known: dict[str, Any] = {key: policy.get(key) for key in ("model", *FORMATS)} if isinstance(policy, dict) else {}
    if not isinstance(known.get("model"), str) or any(known[key] not in values for key, values in FORMATS.items()):
        raise RunError(f"{side}: {folder / CONFIG} does not say which base the policy has")
    known["model"] = _base_of(side, folder / "policy")  # a run that began on an adapter names that
    data = run.get("data")
    return (
        PolicyConfig(**known),
        folder / "policy",
        not (isinstance(data, dict) and data.get("chat_template") == "none"),
    )


def _settings(side: str, path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{side}: {path} is no run's configuration") from error
    if not isinstance(found, dict):
        raise RunError(f"{side}: {path} is no run's configuration")
    return found


def _base_of(side: str, folder: Path) -> str:
    try:
        return base_of(folder)
    except RunError as error:
        raise RunError(f"{side}: {error}") from error


class Answerer:
    """One copy of the base with the adapters of all sides on it; `answer` lets one side speak, greedily."""

    def __init__(self, speakers: dict[str, Speaker], max_new_tokens: int, device: torch.device) -> None:
        """Load the first speaker's base, which is all speakers', and put their adapters on it.

        Raises:
            RunError: a base that cannot be loaded or that `trial.examine` refuses, or an adapter that does not fit it.
        """
        first = next(iter(speakers.values()))
        lm, self.tokenizer = load_causal_lm(first.model, getattr(torch, first.dtype), first.quantization)
        if first.quantization == "none":  # quantised weights are put where they belong while they are loaded
            lm.to(device)
        self._lm = self._model = lm.eval().requires_grad_(False)
        where = f"model {first.model}"
        examine(lm, where)
        self._caches = cache_serves(lm, where)
        self._ends, self._most, self._device = end_tokens(lm, self.tokenizer), max_new_tokens, device
        self._room, self._rows = (context_of(lm) or 2048) - max_new_tokens, rows_of(lm)
        if not first.template:
            self.tokenizer.chat_template = None
        check_template(self.tokenizer, ["user"])
        self.base = of_model(lm, self.tokenizer)
        for side, speaker in speakers.items():
            if speaker.adapter is not None:
                self._put_on(side, speaker.model, speaker.adapter)

    def _put_on(self, side: str, model: str, adapter: Path) -> None:
        from peft import PeftModel, load_peft_weights

        where = f"{side}: the adapter {adapter} does not fit {model}"
        try:
            given = load_peft_weights(str(adapter), device="cpu")
            base = of_base(self._model, given)
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(str(adapter), adapter_name=side)
            else:
                self._model = PeftModel.from_pretrained(self._model, str(adapter), adapter_name=side)
        except Exception as error:  # of packages of their own, whose errors over a damaged file are of all kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(f"{where}, or a file of it is cut short: {first}") from error
        refuse_unfit(self._model, side, given, base, where)
        self._model.eval()
        if words := words_in(adapter):
            print(
                f"{side}: questions are read by the tokenizer and template of the base, not by {words[0]}",
                file=sys.stderr,
            )

    def render(self, question: Question) -> list[int]:
        """The question's tokens, up to where the answer begins.

        Raises:
            RunError: the longest answer would not fit behind it, or the model cannot read it.
        """
        ids = render(self.tokenizer, question.text)
        if len(ids) > self._room:
            raise RunError(
                f"questions: {question.name} takes {len(ids)} tokens, but the model's context leaves {self._room} "
                "beside the longest answer"
            )
        check_tokens(ids, self._rows, self.tokenizer, f"questions: {question.name}")
        return ids

    @torch.no_grad()
    def answer(self, side: str, prompts: list[list[int]]) -> list[list[int]]:
        """The tokens with which `side` answers each prompt, the end token left out.

        Raises:
            NotFinite: logits of which none is the largest.
        """
        width, pad = max(map(len, prompts)), self.tokenizer.eos_token_id
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # generation needs its padding on the left
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with self._speaking(side):
            out = generate(
                self._lm,
                ids.to(self._device),
                mask.to(self._device),
                Greedy(
                    f"{side}: its logits are not finite numbers; a damaged adapter, or one that training let diverge"
                ),
                ends=self._ends,
                pad=pad,
                most=self._most,
                cached=self._caches,
            )
        replies = (ended(reply, self._ends) for reply in out[:, width:].tolist())
        return [reply[:-1] if reply and reply[-1] in self._ends else reply for reply in replies]

    def decode(self, reply: list[int]) -> str:
        """An answer as text, special tokens left out."""
        return self.tokenizer.decode(reply, skip_special_tokens=True).strip()

    @contextmanager
    def _speaking(self, side: str) -> Iterator[None]:
        """With the side's adapter on, or with none where it has none."""
        adapters = getattr(self._model, "peft_config", {})
        if side in adapters:
            self._model.set_adapter(side)
            yield
        elif adapters:
            with self._model.disable_adapter():
                yield
        else:
            yield
