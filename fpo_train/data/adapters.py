"""Folders of LoRA adapters, as PEFT writes them, that a policy can begin on: read before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_train.config import PolicyConfig, RunConfig
from fpo_train.config.profiles import PROFILES
from fpo_train.errors import RunError, about

from .sources import KNOWN, load_tokenizer
from .weights import ADAPTER_CONFIG, is_json

WEIGHTS = "adapter_model.safetensors"
TRAINED = "trained.safetensors"  # of a classifier's weights, those that a run has trained
WHOLE = ("model*.safetensors", "pytorch_model*.bin", "*.gguf")  # files of a model that is no adapter
TASKS = (None, "CAUSAL_LM")
INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")  # beginnings that leave the base as it is
CARRIED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "eva_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
"""Settings of PEFT's that a plain LoRA may have: of all others only those that say nothing."""
NOTHING: tuple[Any, ...] = (None, False, "none", "", {}, [])
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOLD, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
WORDS = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A plain LoRA adapter on the linear layers of a causal language model.

    Attributes:
        name: its folder, as it was asked for. base: what it sits on, as `sources.resolve` takes it.
        settings: its adapter_config.json.
        rank: of its factors, the largest. targets: last names of the layers that carry it, sorted.
    """

    name: str
    base: str
    settings: dict[str, Any]
    rank: int
    targets: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(self.name).expanduser()

    def told(self) -> str:
        """What a policy on it begins as, in words."""
        alpha, on = self.settings["lora_alpha"], ", ".join(self.targets)
        return f"the adapter {self.name} (rank {self.rank}, alpha {alpha}, on {on}) of {self.base}"


def adapter_at(name: str) -> Adapter | None:
    """The adapter in the folder `name`; None where that is something else.

    Raises:
        RunError: an adapter that is no plain LoRA of a causal language model, that does not say what it is or on
            what it sits, or whose weights are missing or cut short; a whole model beside it.
    """
    folder, where = Path(name).expanduser(), f"model {name}"
    if name in KNOWN or not (folder / ADAPTER_CONFIG).is_file():
        return None
    if whole := sorted(path.name for pattern in WHOLE for path in folder.glob(pattern)):
        raise RunError(f"{where}: the folder holds an adapter and a whole model ({whole[0]}); wanted one of them")
    try:
        base, told = base_of(folder), _described(folder)
    except RunError as error:
        raise RunError(f"{where}: {error}") from error
    if told.get("peft_type") != "LORA":
        raise RunError(f"{where}: it is an adapter of the kind {told.get('peft_type')}; wanted LORA")
    if told.get("task_type") not in TASKS:
        raise RunError(f"{where}: it is an adapter for {told['task_type']}; wanted one for CAUSAL_LM")
    if told.get("init_lora_weights") not in INITIAL:
        began = told["init_lora_weights"]
        raise RunError(f"{where}: its init_lora_weights {began!r} changed the base beneath it; wanted a plain LoRA")
    if more := sorted(key for key, value in told.items() if key not in CARRIED and value not in NOTHING):
        raise RunError(f"{where}: its {more[0]} {told[more[0]]!r:.80} is more than a plain LoRA has, which is wanted")
    shapes = _shapes(folder, where)
    factors = {key.partition(".lora_A.")[0]: shape for key, shape in shapes.items() if ".lora_A." in key}
    numbers = [told.get(key) for key in ("r", "lora_alpha", "lora_dropout")]
    if not factors or not all(isinstance(one, int | float) for one in numbers):
        lacks = "r, lora_alpha or lora_dropout" if factors else "factors of linear layers"
        raise RunError(f"{where}: the adapter lacks {lacks}; put the whole folder back")
    targets = tuple(sorted({path.rpartition(".")[2] for path in factors}))
    return Adapter(
        name=name, base=base, settings=told, rank=max(shape[0] for shape in factors.values()), targets=targets
    )


def base_model(name: str) -> str:
    """What an adapter's folder sits on; any other name is itself.

    Raises: as `adapter_at`.
    """
    adapter = adapter_at(name)
    return adapter.base if adapter else name


def base_of(folder: Path) -> str:
    """The base that an adapter of any kind names; a path that is not here is looked for from the adapter's folder.

    Raises:
        RunError: it names none.
    """
    told = _described(folder).get("base_model_name_or_path")
    if not isinstance(told, str) or not told:
        raise RunError(f"{folder / ADAPTER_CONFIG} does not name the adapter's base; add it there")
    elsewhere = told not in KNOWN and not Path(told).expanduser().exists() and (folder / told).exists()
    return str(folder / told) if elsewhere else told


@dataclass(frozen=True)
class Kept:
    """A classifier that a run has trained, as its `reward_model/` keeps it.

    Attributes:
        model: the classifier that was trained, by the name it had. trained: `head` or `lora`. reads: as
            `reward_model.input`. more: `lora_rank` and `lora_alpha`, where it has an adapter.
    """

    folder: Path
    model: str
    trained: str
    reads: str
    more: dict[str, int]

    def refuse_other(self, train: str, settings: dict[str, Any]) -> None:
        """See that a reward model on it is made as it was.

        Args:
            settings: of the reward model, by name.

        Raises:
            RunError: it is not.
        """
        own = {"input": self.reads, **(self.more if train == self.trained == "lora" else {})}
        if other := next((name for name, value in own.items() if settings[name] != value), None):
            told = f"it was trained with reward_model.{other} {own[other]}; wanted the same, got {settings[other]}"
            raise RunError(f"reward_model.model {self.folder}: {told}")


def kept_in(name: str) -> Kept | None:
    """What a folder of that name keeps, if it is one of a run's.

    Raises:
        RunError: it does not say of which model.
    """
    folder = Path(name).expanduser()
    if not (folder / TRAINED).is_file():
        return None
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        more = {name: int(said[name]) for name in ("lora_rank", "lora_alpha") if name in said}
        return Kept(folder, str(said["model"]), str(said["trained"]), str(said["reads"]), more)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f'model {folder}: it has no config.json that names its "model"') from error


def classifier_of(name: str) -> str:
    """The whole model beneath what a name stands for: a model, a folder of a run's, or one of PEFT's.

    Raises:
        RunError: a folder that does not say on what it sits, or an adapter of another kind of model.
    """
    if kept := kept_in(name):
        return classifier_of(kept.model)
    folder = Path(name).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        return name
    if (task := _described(folder).get("task_type")) not in (None, "SEQ_CLS"):
        wanted = f"wanted a whole model, or an adapter of a classifier (SEQ_CLS), this one is of {task}"
        raise RunError(f"model {folder}: the folder holds an adapter; {wanted}")
    return base_of(folder)


def same_model(one: str, other: str) -> bool:
    """Whether two names are one model's: equal, or two ways to one place."""
    paths = [Path(name).expanduser() for name in (one, other)]
    return one == other or (all(path.exists() for path in paths) and os.path.samefile(*paths))


def settle(config: RunConfig) -> RunConfig:
    """The configuration with the rank, alpha, dropout and targets of the adapter that `policy.model` may name.

    Raises:
        RunError: as `adapter_at`; or a setting that is neither the adapter's nor the default.
    """
    profile = {key.removeprefix("policy."): value for key, value in PROFILES[config.profile].items()}
    return dataclasses.replace(config, policy=settled(config.policy, profile))


def settled(config: PolicyConfig, profile: dict[str, Any] | None = None) -> PolicyConfig:
    """`settle` of a policy alone. profile: defaults other than the class's, by name."""
    with about("policy"):
        adapter = adapter_at(config.model)
    if adapter is None:
        return config
    own: dict[str, Any] = {key: adapter.settings[key] for key in ("lora_alpha", "lora_dropout")}
    own |= {"lora_rank": adapter.rank, "lora_targets": adapter.targets}
    defaults = PolicyConfig()
    for key, value in own.items():
        given = getattr(config, key)
        usual = (getattr(defaults, key), (profile or {}).get(key))
        if given not in usual and _plain(given) != _plain(value):
            raise RunError(
                f"policy.{key}: it is {_plain(given)}, but the adapter in policy.model {config.model} has "
                f"{_plain(value)}; a run that begins on an adapter goes on with what that has"
            )
    return dataclasses.replace(config, **own)


def words_in(folder: Path) -> list[Path]:
    """The files of a tokenizer or chat template that lie in an adapter's folder, in order."""
    return sorted({path for pattern in WORDS for path in folder.glob(pattern) if path.is_file()})


def tokenizer_of(adapter: Adapter, base: Any) -> Any:
    """The tokenizer in an adapter's folder, else its `base`'s; with the folder's chat template, else the base's.

    Raises:
        RunError: files that cannot be read.
    """
    folder, found = adapter.folder, base
    if any((folder / file).is_file() for file in TOKENIZERS):
        found = load_tokenizer(adapter.name)
    told = folder / TOLD
    if told.is_file() and not is_json(told):
        raise RunError(f"model {adapter.name}: {told} is damaged or cut short; put the whole file back")
    template = base.chat_template if found.chat_template is None else found.chat_template
    if told.is_file():
        template = json.loads(told.read_text(encoding="utf-8")).get("chat_template") or template
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    found.chat_template = template
    return found


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple | list) else value


def _described(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged or cut short; put the whole file back") from error
    if not isinstance(told, dict):
        raise RunError(f"{path} is no description of an adapter")
    return told


def _shapes(folder: Path, where: str) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        raise RunError(f"{where}: the adapter's weights are not there; wanted {path}")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{where}: {path} is damaged or cut short ({error}); put the whole file back") from error
