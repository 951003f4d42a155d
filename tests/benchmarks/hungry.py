"""A case whose competitors take memory, or break, for processes of their own to find."""

from dataclasses import dataclass

import torch

from benchmarks.registry import Case, Competitor, Contest

MEBIBYTES = 200


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str


def hungry():
    return torch.ones(MEBIBYTES * 2**20, dtype=torch.uint8)[:2]


def broken():
    raise ValueError("no appetite")


def never():
    raise AssertionError("the right answers were computed in the competitor's process")


def build(setting, device):
    runs = {"frugal": lambda: torch.ones(2), "hungry": hungry, "broken": broken}
    return Contest(
        competitors={name: Competitor(run=run, budget=1.0) for name, run in runs.items()},
        expected=never,
        cannot={"absent": "it is elsewhere"},
    )


CASE = Case(
    name="hungry",
    description="memory",
    competitors=("frugal", "hungry", "broken", "absent"),
    baseline="frugal",
    settings=lambda quick, device: [Setting(name="quick" if quick else "full")],
    build=build,
    isolated=lambda setting: ("frugal", "hungry", "broken"),
)
