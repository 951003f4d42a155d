"""What a caller brings, as this package's own: a reward model, an oracle, the settings of both."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file
from torch import nn

from fpo_train.config import PENALTY_KINDS, OracleConfig, PenaltyConfig, PenaltyKind, RewardModelConfig, RunConfig
from fpo_train.data.adapters import kept_in
from fpo_train.data.sources import Classifier, load_causal_lm
from fpo_train.data.turns import messages_of
from fpo_train.errors import RunError, about
from fpo_train.oracle import Oracle
from fpo_train.oracle.function import FunctionOracle
from fpo_train.policy import Policy
from fpo_train.policy.adapters import POLICY, REWARD
from fpo_train.processes import Ranks
from fpo_train.reward_model import RewardModel
from fpo_train.reward_model.classifier import ClassifierRewardModel
from fpo_train.reward_model.kept import load_classifier
from fpo_train.reward_model.on_base import AdapterRewardModel, HeadRewardModel
from fpo_train.rollout import Said

from .groups import Grouped
from .texts import modes_of

Train = Literal["head", "lora", "all"]
IDLE = ("model", "every", "fit", "fit_pairs", "schedule", "warmup", "dropout_when_scoring")
"""Settings of a run's reward model that say when and from what it is trained, which a reward's caller does."""


@dataclass(frozen=True)
class OnBase:
    """A reward model on a trainer's own model: a score head on its frozen base, or that and an adapter `reward`.

    Make it before the trainer, from the PEFT model that the trainer is given: the adapter is no part of what the
    trainer trains, and is switched on while the reward model reads, and then alone.
    """

    model: Any
    """A PEFT model with the trained adapter `default`, and nothing else of it trained."""
    kind: Literal["head", "lora"] = "head"
    folder: str = ""
    """A `reward_model/` that an earlier training on this base left; empty: it begins with a head of zeros."""


def run_config(
    penalty: PenaltyKind | PenaltyConfig,
    gamma: float,
    gamma_units: str,
    parameters: str,
    train: Train | None,
    settings: RewardModelConfig | None,
    given: Any,
    seed: int,
) -> RunConfig:
    """The settings of a run that a reward's are a part of.

    Raises:
        RunError: settings that make no sense, as a run says it.
    """
    for name, value, wanted in (
        ("penalty", penalty, PENALTY_KINDS),
        ("gamma_units", gamma_units, ("raw", "reward_std")),
        ("train", train, (None, "head", "lora", "all")),
        ("OnBase.kind", given.kind if isinstance(given, OnBase) else "head", ("head", "lora")),
    ):
        if not isinstance(value, PenaltyConfig) and value not in wanted:
            raise RunError(f"{name}: wanted one of {', '.join(map(str, wanted))}, got {value!r}")
    if not isinstance(settings, RewardModelConfig | None):
        raise RunError(f"settings: wanted a RewardModelConfig, got a {type(settings).__name__}")
    own, plain = dict(vars(settings or RewardModelConfig())), vars(RewardModelConfig())
    if idle := next((name for name in IDLE if own[name] != plain[name]), None):
        raise RunError(f"settings.{idle}: a reward has no use for it, got {own[idle]!r}")
    own |= {"nan_scores": "drop", "input": "written" if own["input"] == "chat" else own["input"]}
    try:
        if not isinstance(penalty, PenaltyConfig):
            units = cast(Literal["raw", "reward_std"], gamma_units)
            penalty = PenaltyConfig(kind=penalty, gamma=gamma, gamma_units=units, parameters=parameters)
        follows = penalty.parameters if penalty.parameters in ("head", "lora") else "all"
        if isinstance(given, OnBase):
            if (train or given.kind) != given.kind:
                raise RunError(f"train: OnBase trains its {given.kind}, got {train!r}")
            own |= {"kind": given.kind}
        else:
            own |= {"kind": "classifier", "model": given if isinstance(given, str) else type(given).__name__}
            own |= {"train": train or (own["train"] if own["train"] != plain["train"] else follows)}
        if isinstance(given, str) and (kept := kept_in(given)):
            own |= {"input": kept.reads, **(kept.more if own["train"] == kept.trained == "lora" else {})}
        return RunConfig(penalty=penalty, reward_model=RewardModelConfig(**own), seed=seed)
    except (ValueError, TypeError) as error:
        raise RunError(str(error)) from error


def reward_model(given: Any, tokenizer: Any, config: RunConfig, ranks: Ranks) -> RewardModel:
    """A reward model from a folder, a hub id, a module, or `OnBase`.

    Raises:
        RunError: it is none of these, cannot be loaded, or is no reward model.
    """
    if not (tokenizer is None or callable(tokenizer)):
        raise RunError(f"tokenizer: wanted the reward model's tokenizer, or None, got {tokenizer!r:.80}")
    if isinstance(given, OnBase):
        return _on_base(given, tokenizer, config, ranks)
    if isinstance(given, str):
        with about("reward_model"):
            loaded = load_classifier(given, getattr(torch, config.reward_model.dtype))
        own, device = Classifier(loaded.model, tokenizer or loaded.tokenizer, loaded.trained), own_device()
    elif isinstance(given, nn.Module):
        if tokenizer is None:
            raise RunError("tokenizer: wanted the reward model's, got None")
        own, device = Classifier(given, tokenizer, True), next(given.parameters()).device
        outputs = getattr(getattr(given, "config", None), "num_labels", 1)
        if outputs != 1:
            raise RunError(f"reward_model: it has {outputs} outputs; wanted a reward model with one")
    else:
        raise RunError(f"reward_model: wanted a model, a folder, a hub id or OnBase, got a {type(given).__name__}")
    return ClassifierRewardModel(config, ranks, device, own, whole=isinstance(given, nn.Module))


def load_model(name: str, dtype: str = "float32", quantization: str = "none") -> tuple[Any, Any]:
    """A causal language model and its tokenizer: `smollm2`, a local folder, a GGUF file or a hub id.

    Args:
        dtype: "float32" or "bfloat16", of the weights, or of the computation where they are quantised.
        quantization: "none", "nf4" or "int8".

    Raises:
        RunError: it cannot be loaded.
    """
    model, tokenizer = load_causal_lm(name, getattr(torch, dtype), quantization)
    if quantization == "none" and getattr(model, "is_quantized", False):  # a GGUF file's weights are unpacked by now
        model.hf_quantizer.remove_quantization_config(model)  # trainers refuse what is marked so
    return model, tokenizer


def own_device() -> torch.device:
    """This process's GPU, by the number that its launcher gave it; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def _on_base(given: OnBase, tokenizer: Any, config: RunConfig, ranks: Ranks) -> RewardModel:
    if not hasattr(given.model, "get_base_model") or POLICY not in getattr(given.model, "peft_config", {}):
        wanted = f"wanted a PEFT model with the adapter {POLICY!r}, whose base stays as it is"
        raise RunError(f"reward_model: {wanted}, got a {type(given.model).__name__}")
    if tokenizer is None:
        raise RunError("tokenizer: wanted the model's, got None")
    moving = [name for name, p in given.model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if moving:
        told = "trains more than its adapters, so that the base beneath the reward model moves"
        raise RunError(f"reward_model: the model {told}: {moving[0]} and {len(moving) - 1} more")
    kind = HeadRewardModel if given.kind == "head" else AdapterRewardModel
    with modes_of(given.model):
        found = kind(Policy(given.model, tokenizer), config, ranks)
    if given.folder:
        _take_up(found, given)
    for parameter in found.trainable.values():  # not for the trainer's optimizer
        parameter.requires_grad_(False)
    return found


def _take_up(model: HeadRewardModel, given: OnBase) -> None:
    """Go on with what an earlier training on this base left."""
    from peft import load_peft_weights, set_peft_model_state_dict

    folder = Path(given.folder).expanduser()
    try:
        weight = load_file(folder / "head.safetensors")["score.weight"]
        with torch.no_grad():
            model.head.weight.copy_(weight)
        if given.kind == "lora":
            set_peft_model_state_dict(given.model, load_peft_weights(str(folder / REWARD), "cpu"), adapter_name=REWARD)
    except Exception as error:  # of packages of their own, over files of all kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"OnBase.folder: {folder} holds no {given.kind} for this base: {first}") from error


def oracle(given: Callable[..., Any] | Oracle | None, temperature: float) -> Oracle | None:
    """An oracle of this package, or a function as one.

    Raises:
        RunError: it is neither.
    """
    if given is None or isinstance(given, Oracle):
        return given
    if not callable(given):
        raise RunError(f"oracle: wanted a function of prompts and completions, got a {type(given).__name__}")
    try:
        return CalledOracle(OracleConfig(temperature=temperature), given)
    except ValueError as error:
        raise RunError(str(error)) from error


class CalledOracle(FunctionOracle):
    """U by a function as TRL's reward functions are: prompts and completions as the trainer has them, and columns."""

    setting = "oracle"

    def __init__(self, config: OracleConfig, function: Callable[..., Any]) -> None:
        super().__init__(config, function)
        try:
            takes = dict(inspect.signature(function).parameters)
        except ValueError:  # of compiled code
            takes = {}
        self._takes_all = any(one.kind is one.VAR_KEYWORD for one in takes.values())
        self._takes = set(takes)

    def takes(self, column: str) -> bool:
        """Whether the function reads a column of the data."""
        return self._takes_all or column in self._takes

    may_be_silent = True

    def _asked(self, rollout: Said, rows: list[int]) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
        talks, texts = [rollout.talk(row) for row in rows], [rollout.texts[row] for row in rows]
        prompts = [talk if isinstance(talk, str) else messages_of(talk) for talk in talks]
        completions = [
            text if isinstance(talk, str) else [{"role": "assistant", "content": text}]
            for talk, text in zip(talks, texts, strict=True)
        ]
        columns: dict[str, list[Any]] = {}
        if isinstance(rollout, Grouped):
            places = [rollout.place(row) for row in rows]
            columns = {key: [values[place] for place in places] for key, values in rollout.columns.items()}
        return prompts, completions, columns

    def ask(self, prompts: list[Any], completions: list[Any], columns: Mapping[str, list[Any]]) -> list[float]:
        """See `FunctionOracle`: of the columns, those that the function takes."""
        takes = {key: values for key, values in columns.items() if self.takes(key)}
        return super().ask(prompts, completions, takes)
