"""A norm's output in 16 bits made again in one kernel: w ∘ cast(x r), which torch takes two for, one a slow one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Features a program takes: eight for each of 128 threads, in two loads of 16 bytes.
FEATURES = 1024


@triton.jit
def scaled_rows_kernel(x, rows, weight, out, x_stride, width, FEATURES: tl.constexpr):
    """out[t, c] = weight[c] · cast(x[t, c] · rows[t]), cast to out's dtype; grid (T, tiles of features)."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = c < width
    normed = (tl.load(x + (t * x_stride + c), inside, other=0.0) * tl.load(rows + t)).to(out.dtype.element_ty)
    made = normed.to(tl.float32) * tl.load(weight + c, inside, other=0.0).to(tl.float32)
    tl.store(out + (t * width + c), made.to(out.dtype.element_ty), inside)


def scaled_rows(x: Tensor, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """weight · (x · rows).to(dtype), to the bit: (…, p) in the 16-bit dtype; None where these are other factors.

    Args:
        x: (…, p) float32. rows: (…, 1) float32. weight: (p,) of the dtype.
    """
    if not (x.dtype == rows.dtype == torch.float32 and weight.dtype == dtype and dtype.itemsize == 2 and x.ndim > 1):
        return None
    if rows.shape != (*x.shape[:-1], 1) or weight.shape != x.shape[-1:] or not x.numel():
        return None
    flat = x.flatten(0, -2)
    if flat.stride(1) != 1 or not weight.is_contiguous():
        return None
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    width = x.shape[-1]
    with torch.cuda.device_of(x):
        scaled_rows_kernel[len(flat), triton.cdiv(width, FEATURES)](
            flat, rows.flatten().contiguous(), weight, out, flat.stride(0), width, FEATURES=FEATURES, num_warps=4
        )
    return out
