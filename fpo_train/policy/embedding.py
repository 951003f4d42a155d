"""The token embedding in the host's memory: of a large vocabulary it is a gibibyte that a step reads a few rows of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fpo_train.errors import RunError


class HostEmbedding(nn.Module):
    """Rows of a table (V, H) that stays in the host's memory, handed over where the ids are.

    The table is a buffer and no parameter: where a model is, is told by its parameters. A look-up waits for the ids.
    """

    weight: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        host = table.detach().cpu()
        self.register_buffer("weight", host.pin_memory() if torch.cuda.is_available() else host)

    def forward(self, ids: Tensor) -> Tensor:
        """(…,) int64 → (…, H) on their device; a frozen table: no gradient leads to it."""
        return nn.functional.embedding(ids.to(self.weight.device), self.weight).to(ids.device)


def keep_in_host(lm: Any, where: str) -> None:
    """Move a model's input embedding to the host.

    Raises:
        RunError: its output projection is the same table, which every token needs whole.
    """
    table = lm.get_input_embeddings().weight
    if lm.get_output_embeddings().weight is table:
        raise RunError(
            f"policy.input_embedding host: of {where} the output projection is the same table; wanted device"
        )
    lm.set_input_embeddings(HostEmbedding(table))
