"""What a controlled environment came to, as text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def format_table(summary: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """The summary as aligned plain text: a row a penalty and seed, numbers with 4 decimals, and medians over seeds."""
    head = ["environment", "penalty", "seed", "signal", "noise", "utility", "best utility", "oracle calls"]
    keys = ("signal", "noise", "utility", "best_utility")
    rows = []
    for environment, by_penalty in summary.items():
        for penalty, by_seed in by_penalty.items():
            for seed, final in by_seed.items():
                numbers = [f"{final[key]:.4f}" for key in keys]
                rows.append([environment, penalty, seed, *numbers, f"{final['oracle_calls']:.0f}"])
            if len(by_seed) > 1:
                middle = {key: float(np.median([final[key] for final in by_seed.values()])) for key in keys}
                rows.append([environment, penalty, "median", *(f"{middle[key]:.4f}" for key in keys), ""])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    )
