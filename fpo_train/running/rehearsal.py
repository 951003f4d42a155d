"""`--dry_run true`: the whole way of a run, short and in a temporary folder, with stand-ins for what is not at hand.

It shows that the parts of a configuration work together, by two iterations of few and short replies. What the sizes
that were asked for hold in memory it does not measure: `fpo-train plan` says that, and a budget is held to it here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
import yaml

from fpo_train.config import RunConfig
from fpo_train.data.adapters import base_model, settle
from fpo_train.data.sources import KNOWN
from fpo_train.errors import RunError
from fpo_train.memory.architecture import architecture
from fpo_train.memory.plan import USUAL_PROMPT, make_plan
from fpo_train.report.records import CHECKPOINTS, METRICS, read

from .folder import plain
from .run import run

WEIGHTS = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
ITERATIONS = 2  # the last of them twice, since its checkpoint is taken away before the resume
PROMPTS, CANDIDATES, TOKENS, PAIRS = 2, 4, 8, 4  # at most, of an iteration, a prompt, a reply and the first fit


def rehearse(config: RunConfig) -> None:
    """Print the resolved configuration, run two iterations, a checkpoint each, lose the last, and resume.

    Both runs are of one length, which the schedules of the learning rates fall over. Every iteration is one optimizer
    step of the policy and `reward_model.steps` of the reward model. Models and budget are those asked for, where they
    are at hand.

    Raises: as `run`; also where `resume` is asked for, or where the budget does not hold the sizes that were asked for.
    """
    if config.resume:
        raise RunError("dry_run: it rehearses a run from its beginning; wanted resume false, got true")
    print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
    whole, changes = stand_ins(config)
    for change in changes:
        print(f"stands in: {change}")
    whole = settle(whole)
    _check_budget(whole)
    small, changes = shortened(whole)
    for change in changes:
        print(f"for the rehearsal: {change}")
    print("what the sizes asked for take of memory is not measured here; `fpo-train plan` says it")
    with tempfile.TemporaryDirectory(prefix="fpo-rehearsal-") as temporary:
        logging = dataclasses.replace(
            small.logging, checkpoint_every=1, checkpoint_keep=2, tracker="none", controlled=False
        )
        small = dataclasses.replace(
            small, out=str(Path(temporary) / "run"), dry_run=False, iterations=ITERATIONS, logging=logging
        )
        run(small)
        folders = [Path(small.out) / kind for kind in small.compared] or [Path(small.out)]
        for folder in folders:
            shutil.rmtree(folder / CHECKPOINTS / str(ITERATIONS))
        run(dataclasses.replace(small, resume=True))
        for folder in folders:
            rows = read(folder / METRICS)
            steps = sum(row["grad_norm"] > 0 for row in rows)
            trained = sum(row["reward_model_loss"] is not None for row in rows)
            print(f"rehearsed: {len(rows)} iterations, {steps} policy steps, {trained} reward model steps, one resume")
    print("nothing was written to", config.out)


def stand_ins(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration with what is at hand in place of models, data and packages that are not; and each change."""
    changes: list[str] = []

    def replace(section: str, **values: object) -> None:
        nonlocal config
        config = _changed(config, changes, section, **values)

    if not _at_hand(base_model(config.policy.model)):
        replace("policy", model="smollm2")
    if config.reward_model.kind == "classifier" and not _at_hand(config.reward_model.classifier):
        replace("reward_model", model="minilm")
    if config.oracle.kind == "gold" and not _at_hand(config.oracle.model):
        replace("oracle", kind="base", model="")
    if config.data.prompts.count("/") == 1 and not Path(config.data.prompts).exists():
        replace("data", prompts="questions", limit=0, column="", split="train", subset="")
    if not (importlib.util.find_spec("bitsandbytes") and torch.cuda.is_available()):
        replace("policy", quantization="none", dtype="float32")
        replace("oracle", quantization="none")
        replace("update", optimizer="adamw")
        replace("reward_model", optimizer="adamw", dtype="float32")
    if not importlib.util.find_spec("vllm"):
        replace("rollout", engine="transformers")
    if config.memory.budget and not torch.cuda.is_available():
        replace("memory", budget="")
    return config, changes


def shortened(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration with few and short replies, and each change; every phase of an iteration is in it."""
    changes: list[str] = []
    rollout, world = config.rollout, int(os.environ.get("WORLD_SIZE", "1"))
    tokens = min(rollout.max_new_tokens, TOKENS)
    config = _changed(
        config,
        changes,
        "rollout",
        prompts=min(rollout.prompts, max(PROMPTS, world)),
        candidates=min(rollout.candidates, CANDIDATES),
        max_new_tokens=tokens,
        min_new_tokens=min(rollout.min_new_tokens, tokens),
    )
    pairs = min(config.reward_model.fit_pairs, PAIRS)
    return _changed(config, changes, "reward_model", fit_pairs=pairs, every=1), changes


def _changed(config: RunConfig, changes: list[str], section: str, **values: object) -> RunConfig:
    old = getattr(config, section)
    for name, value in values.items():
        if getattr(old, name) != value:
            changes.append(f"{section}.{name} {value!r} for {getattr(old, name)!r}")
    return dataclasses.replace(config, **{section: dataclasses.replace(old, **values)})


def _check_budget(config: RunConfig) -> None:
    """See that `memory.budget` holds the sizes asked for, with prompts as long as a plan takes them to be."""
    if not config.memory.budget:
        return
    policy = architecture(base_model(config.policy.model))
    room = max(1, policy.context - config.rollout.max_new_tokens - 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make_plan(config, policy, min(config.data.max_tokens or USUAL_PROMPT, room), device).check()


def _at_hand(model: str) -> bool:
    """Whether a model is here or is fetched by a known name; one of the hub is here where its weights are cached."""
    if model in KNOWN or Path(model).expanduser().exists():
        return True
    if model.count("/") != 1:
        return False
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(model, name), str) for name in WEIGHTS)
