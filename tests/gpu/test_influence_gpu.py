"""The whole engine on a GPU: against float64 gradients, and replayed passes against eager ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fpo_kernels as fk
from fpo_kernels import capture, remake, sketched
from fpo_kernels.beside import Beside
from fpo_kernels.layers import some_rows
from fpo_kernels.products import config_triton
from tests.fpo_kernels.tiny import PAD, batch_of, error, gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: 2e-5, BF16: 3e-2}
LENGTHS = [40, 3, 1, 64, 17]
SIDES = ["right", "left"]
Batch = dict[str, Tensor]


def llama(dtype: torch.dtype, layers: int = 3, seed: int = 0) -> nn.Module:
    """Head dimensions that fused attention takes, and widths that loads of 16 bytes do."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=PAD,
        initializer_range=0.1,
        use_cache=False,
    )
    return LlamaForSequenceClassification(config).to(dtype=dtype, device="cuda").eval().requires_grad_(False)


def on_gpu(lengths: list[int], seed: int, side: str = "right", width: int | None = None) -> Batch:
    return {name: value.cuda() for name, value in batch_of(lengths, seed, side, width).items()}


def exact(model: nn.Module, batch: Batch) -> Tensor:
    """(B, weights) float64 on the CPU."""
    own = gradients(model.requires_grad_(True), batch, lambda name: True).cpu()
    model.requires_grad_(False)
    return own


def near(got: Tensor, g: Tensor, h: Tensor, dtype: torch.dtype, truth: Tensor) -> None:
    """Measured by the gradients' sizes: inner products may cancel."""
    assert got.is_cuda
    size = g.norm(dim=1).max() * h.norm(dim=1).max()
    assert ((got.cpu().double() - truth).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_question_about_every_parameter(dtype: torch.dtype, side: str) -> None:
    """16 bits are held to the float64 gradients of a model that has rounded in other places: a loose bound."""
    model = llama(dtype)
    batch, reference = on_gpu(LENGTHS, 1, side), on_gpu([33], 2, side, width=64)
    g, h = exact(model, batch), exact(model, reference)
    engine = fk.Influence(model, "all")
    for _ in range(3):  # looked at, met again, replayed
        near(engine.norms(batch), g, g, dtype, (g * g).sum(1))
        near(engine.steering(batch, reference).product, g, g, dtype, (g * g).sum(1) - g @ h[0])
        near(engine.gram(batch), g, g, dtype, g @ g.T)
        near(engine.gram(batch, reference), g, h, dtype, g @ h.T)
    directions = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    v = torch.cat([one.flatten() for one in directions.values()]).double().cpu()
    near(engine.direction(batch, directions), g, v[None], dtype, g @ v)
    sketch = engine.sketch(batch, dim=4096)
    assert error((sketch @ sketch.T).cpu(), g @ g.T) < 0.2


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_replays_are_eager_passes_to_the_bit(dtype: torch.dtype, side: str) -> None:
    """Of every batch of a bucket, while memory around is written over, as the graph itself writes over its own."""
    model = llama(dtype, layers=8)
    engine, eager = fk.Influence(model, "all"), fk.Influence(model, "all", capture="never")
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    width = 64
    for seed in range(8):
        lengths = [width, *torch.randint(1, width, (4,), generator=torch.Generator().manual_seed(seed)).tolist()]
        batch, reference = on_gpu(lengths, seed, side), on_gpu([width], seed + 100, side)
        expected = eager.steering(batch, reference)
        before = len(passes)
        got = engine.steering(batch, reference)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), seed
        if seed > 2:
            assert len(passes) == before, engine.coverage()[0].reason
        _litter = [torch.full((n,), torch.nan, device="cuda") for n in (64, 4096, 2**18) for _ in range(20)]
    assert {row.reason for row in engine.coverage()} == {""}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_replays_of_passes_that_keep_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are met where they arrive, in autograd's own thread; inputs made again; a launch a layer."""
    monkeypatch.setitem(capture.NOTED_BYTES, "cuda", 0)
    monkeypatch.setattr(config_triton, "ENOUGH_FLOPS", 0)
    model = llama(dtype, layers=8)
    engine, eager = fk.Influence(model), fk.Influence(model, capture="never")
    for seed in range(6):
        batch, reference = on_gpu([64, 3, 40], seed), on_gpu([64], seed + 100)
        expected = eager.steering(batch, reference)
        got = engine.steering(batch, reference)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), seed
    assert {row.reason for row in engine.coverage()} == {""}


def test_replays_see_weights_that_were_updated_in_place() -> None:
    model = llama(BF16)
    engine, batch = fk.Influence(model), on_gpu(LENGTHS, 5)
    for _ in range(4):
        engine.norms(batch)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    expected = fk.Influence(model, capture="never").norms(batch)
    assert torch.equal(engine.norms(batch), expected)


def test_several_widths_take_turns() -> None:
    """Recordings share one pool of memory; none spoils another's."""
    model = llama(BF16)
    engine, eager = fk.Influence(model), fk.Influence(model, capture="never")
    for turn in range(5):
        for width in (24, 64, 8, 48):
            batch = on_gpu([width, 2, width // 2], turn, width=width)
            assert torch.equal(engine.norms(batch), eager.norms(batch)), (turn, width)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_runs_beside_a_pass_reads_what_was_there(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch a layer, each beside the backward that goes on, and memory that is used again at once."""
    monkeypatch.setattr(config_triton, "ENOUGH_FLOPS", 0)
    monkeypatch.setattr(sketched, "KEPT_BYTES", 1)
    model = llama(dtype, layers=8)
    engine, batch = fk.Influence(model, "all", capture="never"), on_gpu([256] * 9, 1)
    norms, sketch = engine.norms(batch), engine.sketch(batch, dim=1024)
    torch.cuda.synchronize()
    monkeypatch.setattr(Beside, "run", lambda self, device, work, reads: work())
    alone = fk.Influence(model, "all", capture="never")
    assert torch.equal(alone.norms(batch), norms)
    assert torch.equal(alone.sketch(batch, dim=1024), sketch)
    monkeypatch.undo()
    monkeypatch.setattr(config_triton, "ENOUGH_FLOPS", 0)
    monkeypatch.setattr(sketched, "KEPT_BYTES", 1)
    for _ in range(10):
        assert torch.equal(engine.norms(batch), norms)
        assert torch.equal(engine.sketch(batch, dim=1024), sketch)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_norm_s_output_is_made_again_to_the_bit(dtype: torch.dtype) -> None:
    """In one kernel, of all rows and of some in steps."""
    for shape in ((2, 9, 33), (1, 1, 8), (9, 64, 4096)):
        norm = LlamaRMSNorm(shape[-1]).to(dtype=dtype, device="cuda").requires_grad_(False)
        nn.init.normal_(norm.weight)
        made = norm(torch.randn(shape, device="cuda").to(dtype).requires_grad_())
        maker = remake.maker_of(made)
        assert remake._norm(maker, lambda factor: factor) is not None
        assert torch.equal(remake.remade(maker), made)
        assert torch.equal(remake.remade(maker, some_rows), some_rows(made))
