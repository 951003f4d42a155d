"""What grad_products refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpo_kernels import library
from fpo_kernels.products import grad_products
from fpo_kernels.testing import random_streams

F64 = torch.float64
GOOD = (*random_streams([3, 4], 5, 6), torch.tensor([[0, 1]]))


def _offsets(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.ones(7), ValueError, "a and d must be"),
        (1, torch.ones(6, 6), ValueError, "same S"),
        (0, torch.ones(7, 5, dtype=torch.int32), TypeError, "a must be float32"),
        (1, torch.ones(7, 6, dtype=F64), TypeError, "d must have the dtype of a"),
        (1, torch.ones(7, 6, device="meta"), ValueError, "device of a"),
        (2, torch.tensor([[0, 3, 7]]), ValueError, r"offsets must be \(B\+1,\)"),
        (2, torch.tensor([0.0, 3, 7]), TypeError, "int32 or int64"),
        (2, _offsets(), TypeError, "int32 or int64"),
        (2, _offsets(1, 3, 7), ValueError, "start at 0"),
        (2, _offsets(0, 3, 6), ValueError, "end at the number of rows, 7"),
        (2, _offsets(0, 8, 7), ValueError, "must not fall"),
        (1, [], ValueError, "d must hold at least one"),
        (1, [torch.ones(7, 6), torch.ones(6, 6)], ValueError, "same S"),
        (1, [torch.ones(7, 6), torch.ones(7, 6, dtype=F64)], TypeError, "d must have the dtype of a"),
        (3, torch.tensor([0, 1]), ValueError, r"pairs must be \(n, 2\)"),
        (3, torch.tensor([[0, 1]], dtype=torch.int32), TypeError, "pairs must be int64"),
        (3, torch.tensor([[0, 1]], device="meta"), ValueError, "pairs must be on the device"),
        (3, torch.tensor([[0, 2]]), ValueError, "not there"),
        (3, torch.tensor([[-1, 0]]), ValueError, "not there"),
    ],
)
def test_bad_input_is_named(place: int, value, error: type[Exception], message: str) -> None:
    given_ = [*GOOD]
    if place == 2 and value.numel() == 0:
        value, error, message = torch.empty(0, dtype=torch.int64), ValueError, "offsets must be"
    given_[place] = value
    with pytest.raises(error, match=message):
        grad_products(*given_)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (random_streams([2], 4, 6), ValueError, "widths of a and d"),
        (random_streams([2], 5, 6, F64), TypeError, "other must have the dtype"),
        (random_streams([2], 5, 6)[:2], ValueError, "other must be"),
        ((torch.ones(2, 5), torch.ones(3, 6), _offsets(0, 2)), ValueError, "other's a and d"),
        ((torch.ones(2, 5), torch.ones(2, 6), _offsets(0, 1)), ValueError, "other's offsets must end"),
        (tuple(x.to("meta") for x in random_streams([2, 1], 5, 6)), ValueError, "other must be on the device"),
        ((torch.ones(2, 5), [torch.ones(2, 6)] * 2, _offsets(0, 2)), ValueError, "widths of a and d"),
        ((torch.ones(2, 5), [], _offsets(0, 2)), ValueError, "other's d must hold"),
        (random_streams([2], 5, 6), ValueError, "not there"),  # pairs name example 1 of one
    ],
)
def test_bad_other_is_named(other, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grad_products(*GOOD, other=other)


def test_an_implementation_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="impl must be one of"):
        grad_products(*GOOD, impl="cuda")
    with pytest.raises(ValueError, match="way must be one of auto, tokens, form, got 'forms'"):
        grad_products(*GOOD, way="forms")
    with pytest.raises(RuntimeError, match="impl='native' cannot run way='form': it has 'tokens' only"):
        grad_products(*GOOD, impl="native", way="form")
    with pytest.raises(RuntimeError, match="impl='reference' cannot run way='tokens'"):
        grad_products(*GOOD, impl="reference", way="tokens")
    with pytest.raises(RuntimeError, match=r"triton.*cannot run"):
        grad_products(*GOOD, impl="triton", way="tokens")
    monkeypatch.setattr(library, "_load", lambda kind: "the native library is not built; build it with …")
    with pytest.raises(RuntimeError, match=r"native.*cannot run.*not built"):
        grad_products(*GOOD, impl="native")
    for way in ("auto", "tokens", "form"):  # auto does without it
        assert torch.equal(grad_products(*GOOD, way=way), grad_products(*GOOD, impl="torch", way=way))
