"""The sketch case: what it makes of vectors whose answer is known, what it keeps, and the streams it is fed."""

import json
import math

import pytest
import torch

from benchmarks import gradients
from benchmarks.__main__ import main
from benchmarks.cases import sketch
from benchmarks.models import reward_model, token_batch

CPU = torch.device("cpu")


def test_errors_are_relative_and_averaged_as_said():
    """Two layers of one text: sketches (1 + e)·g have Gram errors 2e + e², whatever the size of g."""
    g = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]], dtype=torch.float64)  # (layers, examples, k)
    exact = g @ g.mT
    over = {0: 0.1, 1: 0.3}
    found = sketch.figures(lambda seed: (1 + over[seed]) * g, exact, seeds=2, bias_seeds=0)
    errors = [2 * e + e * e for e in over.values()]
    assert found["error"] == pytest.approx(sum(errors) / 2)
    assert found["error_deviation"] == pytest.approx(abs(errors[0] - errors[1]) / 2)
    assert found["sum_error"] == pytest.approx(sum(errors) / 2)  # (3, 4)·(1 + e): the layers do not overlap
    assert (found["layers"], found["examples"], found["bytes"], found["sum_bytes"]) == (2, 1, 16, 8)
    assert "bias_t" not in found


@pytest.mark.parametrize(("factor", "sound"), [(1.0, True), (1.05, False)])
def test_bias_is_told_from_noise(factor, sound):
    """64 noisy Gram matrices of 14 layers, right on average or 5% too large."""
    torch.manual_seed(0)
    half = torch.randn(14, 6, 6, dtype=torch.float64)
    exact = half @ half.mT
    noise = torch.randn(64, 14, 6, 6, dtype=torch.float64) * 0.1 * exact.norm(dim=(1, 2))[:, None, None] / 6
    found = sketch._bias(factor * exact + noise, exact)
    assert found["bias_expected"] == pytest.approx(0.1 / 8, rel=0.05)
    assert (found["bias_distance"] <= sketch.MOST_DISTANCE) is sound
    assert (abs(found["bias_t"]) <= sketch.MOST_T) is sound
    (first, second) = sketch.unbiased([{"setting": {"name": "k=64"}, "figures": found}, {"figures": None}])
    assert first.startswith("mean of 64 seeds at k=64: ")
    assert ("no bias" in second) is sound
    assert ("BIASED" in second) is not sound


def test_slope_and_chart():
    def row(dim, competitor, error, status="timed"):
        figures = {"error": error, "error_deviation": 0.001, "sum_error": 1.0, "sum_error_deviation": 0.0}
        return {
            "setting": {"dim": dim},
            "competitor": competitor,
            "status": status,
            "seconds": {"min": 0.0124},
            "figures": {**figures, "bytes": 1000 * dim, "sum_bytes": 4 * dim},
        }

    rows = [row(k, sketch.TENSOR, 3 / math.sqrt(k)) for k in (64, 256, 1024)] + [row(64, sketch.LOGRA, 0.7)]
    rows += [{"setting": {"dim": 64}, "competitor": sketch.DENSE, "status": "cannot run"}]
    assert sketch.slope(rows) == pytest.approx(-0.5)
    head, _, first, *_ = sketch.chart(rows, "error")
    assert head == "| k | tensor sketch | LoGra | SJLT | dense signs | bytes a text |"
    assert first == "| 64 | 0.375 ± 0.001 | 0.700 ± 0.001 | – | – | 64,000 |"
    assert sketch.chart(rows, "seconds")[2] == "| 64 | 12 ms | 12 ms | – | – | 64,000 |"
    assert sketch.chart(rows, "sum_error")[2].endswith("| 256 |")


def test_captured_streams_are_the_gradients():
    """Σ_t d_t a_tᵀ of a padded batch is autograd's gradient of each text's own reward, run alone without padding."""
    layers = {x.name: x for x in gradients.tiny(CPU)}
    assert len(layers) == 14
    backbone = reward_model("tiny", 2, torch.float32, CPU).model
    batch = token_batch(4, 24, CPU)
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 4
    head = torch.randn(48, generator=torch.Generator().manual_seed(0))
    weights = [backbone.get_submodule(name).weight.requires_grad_() for name in layers]
    for n, length in enumerate(lengths):
        hidden = backbone(input_ids=ids[n : n + 1, :length]).last_hidden_state
        truth = torch.autograd.grad(hidden[0, -1] @ head, weights)
        # nothing but rounding reaches the queries and keys of a single token
        least = 1e-5 * max(exact.norm() for exact in truth) if length == 1 else 0
        for x, exact in zip(layers.values(), truth, strict=True):
            rows = slice(int(x.offsets[n]), int(x.offsets[n + 1]))
            assert (x.d[rows].T @ x.a[rows] - exact).norm() <= max(1e-5 * exact.norm(), least)


def test_the_texts_are_sixteen_of_different_length():
    replies = [json.loads(line)["reply"] for line in gradients.REPLIES.read_text(encoding="utf-8").splitlines()]
    assert len({len(reply) for reply in replies}) == len(replies) == 16


def test_a_quick_run_keeps_figures_headlines_and_summary(tmp_path, capsys):
    assert main(["run", "sketch", "--quick", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("sketch-quick.json")
    result = json.loads(path.read_text())
    ours, logra, *_ = result["rows"]
    found = {(line["setting"], line["text"]): line["median"] for line in result["headlines"]}
    assert found["k=64", "error a layer, tensor sketch / LoGra"] == ours["figures"]["error"] / logra["figures"]["error"]
    assert any(line.startswith("error of the tensor sketch ∝ k^-0.") for line in result["summary"])
    assert "\n".join(result["summary"]) in capsys.readouterr().out
