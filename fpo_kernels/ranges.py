"""Sums in fp32 whose terms leave its range on the way, though they themselves may not: taken again in float64.

A product of gradients multiplies four numbers: with activations of 1e-20 and gradients of 1e20 it is one, and on the
way there are squares of 1e-40 and 1e40, of which fp32 keeps few bits or none. Looked at on a CPU alone: a GPU would
have to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SAMPLE = 64  # rows of a stream that tell how large its numbers are
SMALL, LARGE = 1e-15, 1e15  # between them squares, and sums of thousands of squares, keep their bits
TINY = 1e-30  # a result below that is suspected, if its factors are small too


def are_looked_at(made: Tensor) -> bool:
    """Whether a result is one whose terms may have left its range, on a device that is not waited for."""
    return made.dtype != torch.float64 and made.device.type == "cpu"


def are_moderate(*streams: Tensor) -> bool:
    """Whether streams (S, n), or a matrix, have numbers whose squares are safe, by some of their rows."""
    for x in streams:
        if not x.numel():
            continue
        most = largest(x[:: max(1, len(x) // SAMPLE)])
        if 0 < most < SMALL or LARGE < most < torch.inf:
            return False
    return True


def scales(a: Tensor, ds: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """(B,) float64: of each example the largest number of a times the largest of the d's; 0 of an empty one."""
    if not a.shape[1] or not all(d.shape[1] for d in ds):
        return torch.zeros(len(offsets) - 1, dtype=torch.float64)
    rows = [torch.stack([_largest(d, 1) for d in ds]).amax(0), _largest(a, 1)]
    one, other = (torch.segment_reduce(x, "max", offsets=offsets.long(), initial=0) for x in rows)
    return one * other


def largest(x: Tensor) -> Tensor:
    """() float64: a matrix's largest number, 0 of an empty one."""
    return _largest(x, (0, 1)) if x.numel() else torch.zeros((), dtype=torch.float64)


def _largest(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(x, float("inf"), dim=dim).double()  # without a copy of x


def mended(
    operation: str,
    made: Tensor,
    moderate: bool,
    scale: Callable[[], Tensor],
    again: Callable[[Tensor], Tensor],
) -> Tensor:
    """The result, (n,) or (n, k), with what may be wrong taken again.

    Args:
        made: in fp32. moderate: whether the streams' numbers are, see `are_moderate`.
        scale: (n,) float64, of each row the product of the largest numbers that are multiplied for it.
        again: rows (m,) to what they are in float64, (m,) or (m, k).

    Raises:
        ValueError: a result beyond fp32 of numbers that are finite.
    """
    rows = made.abs().reshape(len(made), -1).amax(1) if made.numel() else made.new_zeros(len(made))
    if moderate and not bool((~(rows >= TINY) | (rows == torch.inf)).any()):
        return made
    size = scale()
    lost = size.isfinite() & (size > 0) & (~rows.isfinite() | (not moderate) | ((rows < TINY) & (size < TINY)))
    index = lost.nonzero()[:, 0]
    if not len(index):
        return made
    exact = again(index)
    most = torch.finfo(made.dtype).max
    if bool((exact.abs() > most).any()):
        value = float(exact.flatten()[exact.abs().flatten().argmax()])
        raise ValueError(f"{operation}: a result is {value:.2e}, beyond float32; scale a or d, or pass them in float64")
    return made.index_copy(0, index, exact.to(made.dtype))
