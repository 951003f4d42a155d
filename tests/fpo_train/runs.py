"""Small runs on the tiny model, and what they leave behind."""

import json
from pathlib import Path


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


def children(parent):
    """The processes that a process has begun."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if fields["PPid"].strip() == str(parent):
            found.append(int(fields["Pid"]))
    return found


def is_running(pid):
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
