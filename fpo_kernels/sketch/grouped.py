"""Sketches of many layers in one launch, for a caller that keeps what arrived and has it sketched together."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpo_kernels.sketch import checked, ops
from fpo_kernels.sketch.plan import Streams
from fpo_kernels.sketch.spec import TensorSketch


class Member(NamedTuple):
    """A layer of a launch, or siblings that read one input.

    Attributes:
        a: (S, p) float32, bfloat16 or float16: the layers' inputs, any S rows, of which examples own some.
        ds: each (S, q_l), the gradients of their outputs.
        starts, lengths: (B,) int64 on the device of a: example i owns rows starts[i] to starts[i] + lengths[i].
            Rows of no example are not read, so a padded batch can be taken as it lies.
        longest: what no length exceeds, known on the host.
        sketches: one for each d, of one family, seed and dim.
        slot: the sum it adds to.
    """

    a: Tensor
    ds: tuple[Tensor, ...]
    starts: Tensor
    lengths: Tensor
    longest: int
    sketches: Sequence[TensorSketch]
    slot: int


def is_grouped(a: Tensor) -> bool:
    """Whether streams like `a` are sketched many layers in a launch."""
    return a.is_cuda and a.dtype != torch.float64 and importlib.util.find_spec("triton") is not None


def grouped_sketch(members: Sequence[Member], slots: int) -> Tensor:
    """S[s, i] = Σ over the members of slot s of k^(−1/2) Σ_{t∈i} (W C_a a_t) ∘ (W Σ_l C_l d^l_t): (slots, B, k) fp32.

    Nothing waits for the device and nothing is copied from pageable memory, but for maps that are asked for the first
    time. The same members give the same bits, and an example's do not depend on the others. Sums are fp32 within a
    program, float64 over programs.

    Args:
        members: at least one, all on one device, of one B, dim and seed; dtypes, widths and packings may differ.
            Streams and offsets are trusted.
        slots: how many sums; one without members is zeros.

    Raises:
        RuntimeError: the tensors are not CUDA's (nor Triton's interpreter at work), or a dtype outside those above.
        ValueError: a slot outside 0 to slots − 1; members of different B or dim.
    """
    # triton must not load on a machine that never calls it
    from fpo_kernels.sketch.triton_grouped import sums_of_slots

    examples, dim = len(members[0].starts), members[0].sketches[0].dim
    streams = []
    for member in members:
        if not 0 <= member.slot < slots:
            raise ValueError(f"grouped_sketch: slot must be in 0 to {slots - 1}, got {member.slot}")
        own = len(member.starts), len(member.lengths), member.sketches[0].dim
        if own != (examples, examples, dim):
            raise ValueError(f"grouped_sketch: members must be of B and dim {(examples, dim)}, got {own}")
        maps = [sketch.maps(member.a.device) for sketch in member.sketches]
        ds = [(d, of_d.table) for d, (_, of_d) in zip(member.ds, maps, strict=True)]
        sides = ([(member.a, maps[0][0].table)], ds)
        streams.append(Streams(sides, member.starts, member.lengths, member.longest, member.slot))
    room = ops.load("triton")
    for member in members:
        checked.ensure(room, "triton", member.a, member.sketches)
    with torch.no_grad():
        return sums_of_slots(streams, slots, dim)
