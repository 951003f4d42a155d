"""pack: padded batches to packed streams."""

from __future__ import annotations

import pytest
import torch

from fpo_kernels.packing import pack


def test_rows_in_order_with_holes_and_empty_examples() -> None:
    x = torch.arange(24.0).view(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    for kind in (torch.bool, torch.int64, torch.uint8):
        stream, offsets = pack(x, mask.to(kind))
        assert stream.tolist() == [x[b, t].tolist() for b in range(3) for t in range(4) if mask[b, t]]
        assert offsets.tolist() == [0, 3, 3, 5]
        assert offsets.dtype == torch.int64
    assert pack(x[..., 0], mask)[0].shape == (5,)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 5, dtype=torch.bool), ValueError, r"mask must be \(B, T\)"),
        (torch.ones(3, 4), TypeError, "bool or integer"),
        (torch.full((3, 4), 2), ValueError, "0 and 1"),
        (torch.ones(3, 4, dtype=torch.bool, device="meta"), ValueError, "device of x"),
    ],
)
def test_bad_mask_is_named(mask: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack(torch.ones(3, 4, 2), mask)
