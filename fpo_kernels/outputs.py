"""Output maps: what the model returns, or that and the batch, to one scalar an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .batches import Batch

Output = Callable[..., Tensor]


def first_logit(returned: Any) -> Tensor:
    """(B,) `returned.logits[:, 0]`.

    Raises:
        ValueError: each example has several logits: of a classifier with two labels the first is that of the negative.
    """
    logits: Tensor = returned.logits
    if logits.ndim != 2 or logits.shape[1] != 1:
        wanted = "pass output=, such as lambda returned: returned.logits[:, 1]"
        raise ValueError(f"output: the model gives logits of shape {tuple(logits.shape)}, wanted (B, 1); {wanted}")
    return logits[:, 0]


class OutputMap:
    """Lets an output map take (returned) or (returned, batch): two parameters without defaults ask for both."""

    def __init__(self, output: Output) -> None:
        try:
            signature = inspect.signature(output.forward if isinstance(output, nn.Module) else output)
        except ValueError:  # some built-ins show none
            signature = inspect.Signature()
        accepts = signature.parameters.values()
        needed = [p for p in accepts if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
        self.output, self.with_batch = output, len(needed) >= 2

    def __call__(self, returned: Any, batch: Batch) -> Tensor:
        return self.output(returned, batch) if self.with_batch else self.output(returned)
