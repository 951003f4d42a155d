"""Matrices made ready for products of few rows."""

import sys
import types

import pytest
import torch
from torch import nn

from fpo_train.rollout import packing
from fpo_train.rollout.packing import packed, packed_bytes, unpacked


def model(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 65, bias=bias), nn.Tanh(), nn.Linear(65, 3, bias=bias)).requires_grad_(False)


def off(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


def exactly(layers, x):
    x = x.double()
    for layer in layers:
        x = layer(x) if not isinstance(layer, nn.Linear) else nn.functional.linear(
            x, layer.weight.double(), None if layer.bias is None else layer.bias.double()
        )  # fmt: skip
    return x


@pytest.mark.parametrize("shape", [(1, 37), (5, 1, 37), (36, 1, 37), (2, 9, 37), (0, 1, 37), (200, 37)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_what_linear_gives(shape, bias):
    layers, x = model(bias), torch.randn(*shape)
    with packed(layers):
        assert "forward" in vars(layers[0])
        found = layers(x)
    assert found.shape == (*shape[:-1], 3)
    assert found.dtype == torch.float32
    if x.numel():
        assert off(found, exactly(layers, x)) < 1e-6
    assert packed_bytes(layers) == 4 * (37 * 65 + 65 * 3)


@torch.no_grad()
def test_nothing_is_drawn_from_the_run_s_numbers():
    layers = model()
    packing._works.cache_clear()
    before = torch.get_rng_state()
    with packed(layers):
        assert "forward" in vars(layers[0])
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_a_changed_matrix_is_arranged_again():
    layers, x = model(), torch.randn(4, 37)
    for _ in range(2):
        with packed(layers):
            assert off(layers(x), exactly(layers, x)) < 1e-6
        layers[0].weight.data += 0.1  # as PEFT merges an adapter: its version stays
        layers[2].weight.data = torch.randn(3, 65)


@torch.no_grad()
def test_other_layers_run_as_they_are():
    class Own(nn.Linear):
        pass

    layers = nn.ModuleList([Own(8, 8), nn.Linear(8, 8).double(), nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8)])
    layers.requires_grad_(False)
    layers[3].requires_grad_(True)  # training would arrange it at every step
    replaced = nn.Linear(8, 8).requires_grad_(False)
    replaced.forward = lambda x: x
    layers.append(replaced)
    before = [dict(vars(layer)) for layer in layers]
    with packed(layers):
        assert [dict(vars(layer)) for layer in layers] == before
    assert packed_bytes(layers) == 0


def test_never_under_a_tape_and_not_beyond_its_bound(monkeypatch):
    layers = model()
    with packed(layers):
        assert "forward" not in vars(layers[0])
    monkeypatch.setattr(packing, "MOST_PACKED", 4 * (37 * 65 + 65 * 3) - 1)
    with torch.no_grad(), packed(layers):
        assert "forward" not in vars(layers[0])
    assert packed_bytes(layers) == 0


@torch.no_grad()
def test_layers_are_themselves_again_after_a_failure():
    layers = model()
    with pytest.raises(RuntimeError), packed(layers):
        layers(torch.randn(4, 36))
    assert "forward" not in vars(layers[0])
    assert "forward" not in vars(layers[2])


class Linear4bit(nn.Module):
    """As bitsandbytes' layer: codes that are unpacked in every call, products in a number format of its own."""

    __module__ = "bitsandbytes.nn.modules"
    unpackings = 0

    def __init__(self, bias, compute_dtype=torch.bfloat16):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-8, 8, (12, 9), dtype=torch.int8), requires_grad=False)
        self.weight.quant_state = types.SimpleNamespace(dtype=torch.float32)
        self.bias = nn.Parameter(torch.randn(12), requires_grad=False) if bias else None
        self.compute_dtype = compute_dtype

    @classmethod
    def dequantize_4bit(cls, codes, state):
        cls.unpackings += 1
        return (codes.float() / 7).to(state.dtype)

    def forward(self, x):
        as_it_computes = [
            None if one is None else one.to(self.compute_dtype or torch.float32)
            for one in (x, self.dequantize_4bit(self.weight, self.weight.quant_state), self.bias)
        ]
        return nn.functional.linear(*as_it_computes).to(x.dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@torch.no_grad()
def test_4_bit_layers_are_unpacked_once_and_say_the_same(monkeypatch, bias, dtype):
    library = types.SimpleNamespace(functional=types.SimpleNamespace(dequantize_4bit=Linear4bit.dequantize_4bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    torch.manual_seed(0)
    layers = nn.ModuleList([Linear4bit(bias, dtype) for _ in range(3)] + [nn.Linear(9, 12)])
    layers[2].weight.quant_state.packing_format_for_cpu = True
    x = torch.randn(5, 1, 9)
    truth = [layer(x) for layer in layers]
    with unpacked(layers):
        before = Linear4bit.unpackings
        for _ in range(4):
            assert all(torch.equal(layer(x), known) for layer, known in zip(layers, truth, strict=True))
        assert Linear4bit.unpackings == before + 4  # by the one that a CPU has arranged in its own way
    assert not any("forward" in vars(layer) for layer in layers)
    layers[0](x)
    assert Linear4bit.unpackings == before + 5
