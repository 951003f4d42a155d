"""A judge's oracle in front of a stub, asked about texts alone, on a clock that passes only by sleeping."""

import torch

from fpo_train.config import OracleConfig
from fpo_train.oracle import JudgeOracle, Labels
from fpo_train.oracle.endpoint import Time
from fpo_train.rollout import Written


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.seconds, self.sleeps = 100.0, []

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.seconds += seconds

    @property
    def time(self):
        return Time(now=lambda: self.seconds, sleep=self.sleep)


def rollout(candidates, reference="the reference"):
    """One prompt of texts alone."""
    n = len(candidates)
    rows, references, usable = torch.arange(n), torch.full((n,), n), torch.ones(1, n, dtype=torch.bool)
    return Written(["Which is better?"] * (n + 1), [*candidates, reference], rows, references, usable)


def judge(stub, tmp_path, *, sleeps=None, clock=None, seed=0, rank=0, world=1, **settings):
    url = stub if isinstance(stub, str) else stub.url
    settings = {"timeout": 5.0, "requests_per_minute": 1e9, "model": "m", "retries": 3, **settings}
    config = OracleConfig(kind="judge", url=url, **settings)
    clock = clock or Time(sleep=[].append if sleeps is None else sleeps.append)
    return JudgeOracle(config, tmp_path / "judge.jsonl", seed=seed, rank=rank, world=world, time=clock)


def ask(oracle, texts):
    """p* of all texts against the reference, through `Labels`."""
    labels = Labels(oracle, rollout(texts), readings=None)
    return labels, labels.preferences(torch.ones(1, len(texts), dtype=torch.bool))[0].tolist()


def likes(winner):
    """Prefers the reply with `good` in it, wherever it stands; `winner` where none has."""

    def prefer(message, a, b):
        return "A" if "good" in a else "B" if "good" in b else winner

    return prefer
