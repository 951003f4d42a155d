"""Small runs on the tiny model, and what they leave behind."""

import json


def arguments(tiny, out, *more):
    small = {
        "policy.model": tiny, "policy.lora_rank": 4, "rollout.prompts": 2, "rollout.candidates": 3,
        "rollout.max_new_tokens": 6, "reward_model.fit_pairs": 6, "iterations": 3, "logging.checkpoint_every": 1,
        "update.learning_rate": 1e-2, "out": out,
    }  # fmt: skip
    return ["run", *[word for key, value in small.items() for word in (f"--{key}", str(value))], *map(str, more)]


def rows(folder, drop=("seconds", "peak_memory_bytes")):
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in text.splitlines()]


def contents(folder, pattern="*"):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}
