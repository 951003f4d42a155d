"""The counted run sees known sinners, and no others; then the engine, whose count is that of its own lines."""

import os
import subprocess
import sys

import pytest
import torch

import fpo_kernels as fk
from benchmarks.counting import Counted
from benchmarks.models import block_weights, reward_model, rows, token_batch

CPU = torch.device("cpu")
X = torch.arange(1.0, 7.0)
SINNERS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 0).all()),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: (x * 2).numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 2],
    "put by a mask": lambda x: x.clone().__setitem__(x > 2, 0.0),
    "where": lambda x: torch.where(x > 2),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long()),
    "bincount": lambda x: x.long().bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "copied to the host": lambda x: torch.empty(6).copy_(x),
    "in no_grad, after a view": lambda x: x.view(2, 3).T[0].detach().max().item(),
}
PAGEABLE = {
    "to": lambda x: torch.arange(3).to(x.device) + x[:3],
    "to another": lambda x: torch.arange(3).to(x),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "copy_": lambda x: x.clone().copy_(torch.ones(6)),
    "index": lambda x: x[torch.tensor([1, 2])],
}
INNOCENT = {
    "arithmetic": lambda x: (x * 2 + 1).sum().sqrt(),
    "made there": lambda x: torch.zeros(6, device=x.device) + x,
    "index": lambda x: x[torch.arange(3, device=x.device)],
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long(), output_size=21),
    "host alone": lambda x: (torch.arange(3).tolist(), int(torch.ones(2).sum()), torch.arange(3).nonzero()),
    "pinned": lambda x: torch.arange(6).pin_memory().to(x.device, non_blocking=True) + x,
    "dtype": lambda x: x.to(torch.float64),
    "to where it is": lambda x: x.to(x.device),
}


@pytest.mark.parametrize("name", SINNERS)
def test_waiting_is_seen(name):
    with Counted(X) as counts:
        SINNERS[name](X)
    assert len(counts.synchronisations) == 1, counts.synchronisations
    assert not counts.pageable_copies
    assert "test_counting.py" in counts.synchronisations[0].where


@pytest.mark.parametrize("name", PAGEABLE)
def test_pageable_copies_are_seen(name):
    with Counted(X) as counts:
        PAGEABLE[name](X)
    assert len(counts.pageable_copies) == 1, counts.pageable_copies
    assert not counts.synchronisations
    assert "test_counting.py" in counts.pageable_copies[0].where


@pytest.mark.parametrize("name", INNOCENT)
def test_nothing_else_is(name):
    with Counted(X) as counts:
        INNOCENT[name](X)
    assert not counts.synchronisations
    assert not counts.pageable_copies
    assert len(counts.pinned_copies) == (name == "pinned")


def test_what_was_on_the_device_is_forgotten_with_it():
    """A new tensor on the host may get a freed one's memory."""
    with Counted(X) as counts:
        for _ in range(20):
            gone = X * 2
            del gone
            (torch.ones(6) * 2).sum().item()
    assert not counts.synchronisations


def test_within_backward():
    x = X.clone().requires_grad_()
    with Counted(x) as counts:
        y = x * 2
        y.register_hook(lambda d: d * d.sum().item())
        y.sum().backward()
    (event,) = counts.synchronisations
    assert "register_hook" in event.where


def test_steering_is_counted():
    """Warm, as it is called iteration after iteration: what is counted lies in the engine's and the model's lines."""
    model = reward_model("narrow", 2, torch.float32, CPU)
    batch = token_batch(9, 12, CPU)
    candidates, reference = rows(batch, slice(0, -1)), rows(batch, slice(-1, None))
    engine = fk.Influence(model, parameters=block_weights(model))
    expected = engine.steering(candidates, reference).product
    with Counted(model, candidates, reference) as counts:
        got = engine.steering(candidates, reference).product
    assert torch.equal(got, expected)
    assert all(event.where for event in counts.synchronisations)


def test_launches_of_the_interpreter():
    pytest.importorskip("triton")
    code = """
import torch, fpo_kernels as fk
from benchmarks.counting import Counted
from fpo_kernels.testing import random_streams
a, d, offsets = random_streams([5, 0, 3], 8, 4)
with Counted(a, d, offsets) as counts:
    fk.grad_products(a, d, offsets, torch.tensor([[0, 2], [1, 1]]), impl="triton", way="tokens")
print(counts.launches)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kernel") == 1
