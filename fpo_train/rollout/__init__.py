"""Replies: who samples them, from random streams of their own, and what the frozen base reads in them.

`local` is this process, `vllm` an engine beside it; `sampling` is one token's choice, `packing` arranges matrices,
`base` is what came of it.
"""

from .base import Readings, Rollout, Sampler
from .load import sampler
from .local import TransformersSampler

__all__ = ["Readings", "Rollout", "Sampler", "TransformersSampler", "sampler"]
