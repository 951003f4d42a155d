"""Whether a batch's entries hold one thing an example."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from .batches import Batch, take
from .compare import close


def refuse_shared(batch: Batch, doubtful: Collection[str], outputs: Callable[[Batch], Tensor]) -> None:
    """Refuse entries as long as the batch, `doubtful`, unless two examples have the same outputs apart as together.

    Raises:
        ValueError: they have not; the entries are named.
    """
    told = ", ".join(sorted(doubtful))
    wanted = "wanted entries that hold one thing an example, or are not as long as the batch"
    try:
        both = outputs(take(batch, slice(0, 2)))
        alone = torch.cat([outputs(take(batch, slice(i, i + 1))) for i in range(2)])
    except (RuntimeError, ValueError, IndexError, TypeError) as problem:
        raise ValueError(
            f"batch: {told}: as long as the batch, and the model does not take two examples of it with its share "
            f"({type(problem).__name__}: {problem}); {wanted}"
        ) from problem
    if not close(both, alone):
        raise ValueError(
            f"batch: {told}: as long as the batch, but two examples give other outputs apart than together; {wanted}"
        )
