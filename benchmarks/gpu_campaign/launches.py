"""Launches, synchronisations and copies of one warm call, and the time of its kernels."""

from __future__ import annotations

import functools
from collections import Counter

import torch

from benchmarks import peers
from benchmarks.counting import Counted, Counts
from benchmarks.gpu_campaign.clock import Run, tidy
from benchmarks.gpu_campaign.engine import BACKWARD, STEERING, engine
from benchmarks.gpu_campaign.record import Record
from benchmarks.models import block_weights, reward_model, rows, token_batch

MOST = 12  # kinds of kernels, and of events, that a row keeps


def run(record: Record) -> None:
    """One row a length and call, of the 8B shape in 32 layers (4 if quick; two tiny ones on a CPU)."""
    cuda = record.device.type == "cuda"
    shape, layers, lengths = ("llama3.1-8b", 4 if record.quick else 32, (64, 256, 512)) if cuda else ("tiny", 2, (12,))
    model = reward_model(shape, layers, torch.bfloat16 if cuda else torch.float32, record.device)
    names = block_weights(model)
    for tokens in lengths[:1] if record.quick else lengths:
        batch = token_batch(9, tokens, record.device, full=True)
        candidates, reference = rows(batch, slice(0, -1)), rows(batch, slice(-1, None))
        eager = engine(model, names)
        calls: dict[str, Run] = {
            BACKWARD: functools.partial(peers.forward_and_backward, model, batch),
            STEERING: lambda eager=eager, c=candidates, r=reference: eager.steering(c, r).product,  # type: ignore[misc]
            "sketch 4096": functools.partial(eager.sketch, batch, dim=4096),
        }
        for name, call in calls.items():
            for _ in range(2):
                call()
            with Counted(model, candidates, reference, batch) as counts:
                call()
            record.add(_said(tokens, name, counts), setting=f"8+1 of {tokens}", run=name, **_kept(counts))
        del eager, calls
        tidy(record.device)


def _kept(counts: Counts) -> dict[str, object]:
    heaviest = sorted(counts.kernel_ms.items(), key=lambda item: -item[1])[:MOST]
    return {
        "launches": len(counts.launches),
        "launches_by_kernel": dict(Counter(counts.launches)),
        "kernels": counts.kernels,
        "kernel_ms": sum(counts.kernel_ms.values()) if counts.kernels is not None else None,
        "heaviest": [{"kernel": name[:100], "ms": ms} for name, ms in heaviest],
        **{
            kind: [
                {"count": count, "what": event.what, "where": event.where}
                for event, count in Counter(getattr(counts, kind)).most_common(MOST)
            ]
            for kind in ("synchronisations", "pageable_copies")
        },
        "synchronises": len(counts.synchronisations),
        "copies_pageable": len(counts.pageable_copies),
    }


def _said(tokens: int, name: str, counts: Counts) -> str:
    kernels = "" if counts.kernels is None else f"{counts.kernels} kernels, {sum(counts.kernel_ms.values()):.2f} ms, "
    waits, copies = len(counts.synchronisations), len(counts.pageable_copies)
    return f"9 × {tokens}: {name}: {kernels}{len(counts.launches)} of ours, {waits} waits, {copies} pageable copies"
