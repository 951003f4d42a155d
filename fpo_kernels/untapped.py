"""Looks at what a model does while its taps stand idle: why a pass with them went wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .batches import Batch, take
from .capture import Taps
from .compare import close

Outputs = Callable[[Batch], Tensor]


def meet(batch: Batch, taps: Taps, together: Tensor, outputs: Outputs) -> bool:
    """Whether examples alone have other outputs than together. Leaves the taps idle."""
    taps.idle = True
    with torch.no_grad():
        alone = torch.cat([outputs(take(batch, slice(i, i + 1))) for i in range(len(together))])
    return not close(alone, together)


def runs(batch: Batch, taps: Taps, outputs: Outputs) -> bool:
    """Whether the model takes this batch where no call is expanded."""
    taps.idle = True
    try:
        with torch.no_grad(), taps.uses.paused():
            outputs(batch)
    except Exception:
        return False
    finally:
        taps.idle = False
    return True
