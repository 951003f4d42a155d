"""Inputs made again from what autograd keeps: which, and to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fpo_kernels.layers import some_rows
from fpo_kernels.remake import is_cast, maker_of, remade

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normed(kind: type[nn.Module]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        norm = kind(x.shape[-1]).to(x.dtype).requires_grad_(False)
        nn.init.normal_(norm.weight)
        return norm(x)

    return run


MADE = {
    "a norm": normed(LlamaRMSNorm),
    "a norm that casts last": normed(GemmaRMSNorm),
    "a gate": lambda x: nn.functional.silu(x) * (x + 1),
    "a gate in float32": lambda x: (nn.functional.silu(x.float()) * (x.float() + 1)).to(x.dtype),
    "a product in 16 bits that goes on in 32": lambda x: (x.bfloat16().sin() * x.bfloat16().cos()).float(),
    "a row for all": lambda x: x.sin() * x.cos()[:, :1],
}
KEPT = {
    "a sum": lambda x: x + 1,
    "a cast": lambda x: x.double(),
    "a cast of a sum": lambda x: (x + 1).double(),
    "an input": lambda x: x,
    "a product of an unkept factor": lambda x: torch.ones(5, 7, 1).to(x) * (x + 1),
}


def values(dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 7, 33, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", MADE)
def test_made_again_to_the_bit(how: str, dtype: torch.dtype) -> None:
    made = MADE[how](values(dtype))
    maker = maker_of(made)
    assert maker is not None
    again = remade(maker)
    assert again.dtype == made.dtype
    assert torch.equal(again, made)
    assert torch.equal(remade(maker, some_rows), some_rows(made))


@pytest.mark.parametrize("how", KEPT)
def test_what_autograd_does_not_keep_has_no_maker(how: str) -> None:
    assert maker_of(KEPT[how](values(torch.float32))) is None


def test_which_are_casts() -> None:
    told = {(how, dtype): is_cast(maker_of(make(values(dtype)))) for how, make in MADE.items() for dtype in DTYPES[:2]}
    casts = {how for (how, dtype), cast in told.items() if cast and dtype == torch.bfloat16}
    assert casts == {"a norm", "a norm that casts last", "a gate in float32", "a product in 16 bits that goes on in 32"}
    assert {how for (how, dtype), cast in told.items() if cast and dtype == torch.float32} == {
        "a product in 16 bits that goes on in 32"
    }


def test_nothing_is_made_again_where_hooks_pack_what_is_saved() -> None:
    with torch.autograd.graph.save_on_cpu():
        assert maker_of(MADE["a gate"](values(torch.float32))) is None
