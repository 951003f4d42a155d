"""Recorded passes, with a recorder that runs them again in place of a CUDA graph: interpreted, in its own process."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fpo_kernels as fk
from fpo_kernels import captured, passes, totals
from fpo_kernels.captured import bucket
from fpo_kernels.streams import counted_tables
from tests.fpo_kernels.interpreted import inside, outside, passes_apart
from tests.fpo_kernels.tiny import PAD, batch_of, error, rows_of_gradients, tiny_llama

pytest.importorskip("triton")
TOLERANCE = 1e-5


@outside
def test_in_its_own_process() -> None:
    passes_apart(__file__)


class Again:
    """Does the work again into the tensors that it gave first."""

    made: int = 0

    def __init__(self, work) -> None:
        type(self).made += 1
        self.work, self.replays = work, 0
        self.answer = work()

    def replay(self) -> None:
        self.replays += 1
        for held, now in zip(self.answer, self.work(), strict=True):
            held.copy_(now)


class Recorder:
    def __init__(self) -> None:
        self.recordings: list[Again] = []

    def serves(self, device: torch.device) -> bool:
        return True

    def record(self, work) -> Again:
        rooms = []
        with mock.patch.object(passes.Passes, "padding_read", side_effect=AssertionError("read while recorded")):
            # what is made aside tells how much memory a recording's tables want; looked at once
            for do in (*(() if self.recordings else (work,)), lambda: self.recordings.append(Again(work))):
                with counted_tables() as room:
                    do()
                rooms.append(room)
        assert rooms[0] == rooms[-1]
        assert rooms[0]
        return self.recordings[-1]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(captured, "CudaGraphs", lambda: made)
    for module in (passes, totals):
        monkeypatch.setattr(module, "are_grouped", lambda d: d.dtype != torch.float64)
    return made


class Last(nn.Module):
    """Reads the last position, padding or not: another width is another answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embed, self.layer, self.score = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.config = type("Config", (), {"pad_token_id": PAD})()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.layer(self.embed(input_ids)).tanh().cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.score(h[:, -1])[:, 0]


# What is interpreted takes seconds: an embedding, a norm, a layer with siblings, one whose input is made again.
CHOSEN = ["model.embed_tokens.weight", "model.norm.weight", "*.0.*.[qk]_proj.weight", "*.1.mlp.down_proj.weight"]


def truth(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    names = [row.parameter for row in fk.Influence(model, CHOSEN).coverage()]
    twin = tiny_llama(dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    twin = twin.double()
    wanted = [twin.get_parameter(name) for name in names]
    rows = []
    for i in range(len(batch["input_ids"])):
        score = twin(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0, 0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(score, wanted)]))
    return torch.stack(rows).square().sum(1)


@inside
@pytest.mark.parametrize("side", ["right", "left"])
def test_one_recording_serves_every_batch_of_a_bucket(recorder: Recorder, side: str) -> None:
    """And sees weights that are updated in place; replaced ones make it be recorded anew."""
    model = tiny_llama(dtype=torch.float32)
    engine = fk.Influence(model, CHOSEN)
    for seed, lengths in enumerate(([9, 4, 1, 12], [10, 9, 9, 9], [3, 16, 2, 5], [1, 1, 11, 2], [16, 16, 2, 16])):
        batch = batch_of(lengths, seed, side)
        assert error(engine.norms(batch), truth(model, batch)) < TOLERANCE
    assert len(recorder.recordings) == 1
    assert recorder.recordings[0].replays == 4  # once to be compared
    batch = batch_of([2, 13, 7, 7], 9, side)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    assert error(engine.norms(batch), truth(model, batch)) < TOLERANCE
    assert recorder.recordings[0].replays == 5
    model.score.weight.data = model.score.weight.data.clone() * 2
    for _ in range(2):
        assert error(engine.norms(batch), truth(model, batch)) < TOLERANCE
    assert [recording.replays for recording in recorder.recordings] == [5, 2]
    assert all(row.reason == "" for row in engine.coverage())


@inside
def test_to_the_bit_what_the_eager_pass_gives(recorder: Recorder) -> None:
    model = tiny_llama(dtype=torch.float32)
    batch, reference = batch_of([16, 3, 9], 1, width=16), batch_of([16], 2, width=16)
    engine, eager = fk.Influence(model, CHOSEN), fk.Influence(model, CHOSEN, capture="never")
    expected = eager.steering(batch, reference)
    for _ in range(4):
        got = engine.steering(batch, reference)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert recorder.recordings[0].replays == 3


@inside
def test_a_model_that_minds_its_width_has_a_recording_for_each(recorder: Recorder) -> None:
    model = Last()
    engine = fk.Influence(model, output=lambda returned: returned)
    batch = batch_of([9, 9], 3)
    g = rows_of_gradients(Last().double(), batch)
    for _ in range(5):
        assert error(engine.norms(batch), g.square().sum(1)) < TOLERANCE
    assert len(recorder.recordings) == 2
    assert recorder.recordings[1].replays > 1
    assert bucket(9) == 16


@inside
def test_what_cannot_be_recorded_runs_eagerly_and_says_so(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(dtype=torch.float32)
    batch = batch_of([4, 7], 4)
    for problem, told in (
        (RuntimeError("operation not permitted\nand more"), "RuntimeError: operation not permitted"),
        (passes.UnexpectedError(), "UnexpectedError: no message"),
    ):
        monkeypatch.setattr(recorder, "record", mock.Mock(side_effect=problem))
        engine = fk.Influence(model, CHOSEN)
        for _ in range(4):
            assert error(engine.norms(batch), truth(model, batch)) < TOLERANCE
        reasons = {row.reason for row in engine.coverage()}
        assert reasons == {f"runs eagerly: not captured in a CUDA graph ({told})"}


@inside
def test_recordings_are_few_and_large_batches_are_not_recorded(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "MOST", 2)
    model = tiny_llama(dtype=torch.float32)
    engine = fk.Influence(model, CHOSEN)
    for width in (8, 16, 24, 8):
        for seed in range(3):
            engine.norms(batch_of([width, 1], seed))
    assert len(recorder.recordings) == 4  # the first was given up for the third
    monkeypatch.setattr(captured, "MOST_TOKENS", 15)
    engine = fk.Influence(model, CHOSEN)
    for _ in range(3):
        engine.norms(batch_of([8, 2], 1))
    assert len(recorder.recordings) == 4


def test_buckets_waste_a_quarter_at_most() -> None:
    assert all(width <= bucket(width) < max(width * 1.25, width + 8) for width in range(1, 5000))


def test_refuses_another_mode() -> None:
    with pytest.raises(ValueError, match="capture='always': wanted 'auto' or 'never'"):
        fk.Influence(nn.Linear(2, 1), capture="always")
