"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

MOST_PACKED = 2 * 2**30  # bytes of matrices that a CPU keeps a second time, arranged for decoding

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}{more}": 1000**power for power, prefix in enumerate("KMGT", 1) for more in ("", "B")}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def parse_bytes(text: str, name: str) -> int:
    """A size such as 24GiB, 1.5 GB, 24G (the same as 24GB) or 2000000, in bytes; `name` is the setting's, to complain.

    Raises:
        ValueError: anything else, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise ValueError(f"{name}: wanted a size such as 24GiB or 800MB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def show_bytes(size: float) -> str:
    """A size to two digits behind the point, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
