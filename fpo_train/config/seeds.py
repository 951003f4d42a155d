"""Seeds of the random streams of a run, each from the place it is used at."""

from __future__ import annotations

from hashlib import blake2b


def mix(*parts: int | str) -> int:
    """A seed of 63 bits for one place: other parts, or the same in another order, give a stream of its own."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
