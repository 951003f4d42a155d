"""Replies: who samples them, from random streams of their own, and what the frozen base reads in them.

`local` is this process, `vllm` an engine beside it; `sampling` is one token's choice, `packing` arranges matrices,
`base` is what came of it, `written` the same of texts that came from elsewhere.
"""

from .base import Readings, Rollout, Sampler
from .load import sampler
from .local import TransformersSampler
from .written import NotRead, Said, Written, rows_of, sampled

__all__ = [
    "NotRead",
    "Readings",
    "Rollout",
    "Said",
    "Sampler",
    "TransformersSampler",
    "Written",
    "rows_of",
    "sampled",
    "sampler",
]
