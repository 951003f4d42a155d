"""A call that goes by pieces answers as one that does not, and one that must not go by pieces does not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fpo_kernels as fk
from fpo_kernels import pieces
from tests.fpo_kernels.tiny import LINEAR, batch_of, error, gradients, is_linear, tiny_llama


@pytest.fixture
def small(monkeypatch):
    """Pieces of 24 tokens."""
    monkeypatch.setattr(pieces, "TOKENS", 24)


@pytest.fixture
def model():
    return tiny_llama(3)


def sizes_of(model):
    """How many sequences each forward had, from now on."""
    seen = []
    model.model.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    return seen


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_answer_equals_the_autograd_loop(small, model, side):
    lengths = [8, 3, 8, 1, 5, 8, 7, 8, 2, 8, 4]
    batch, other, single = batch_of(lengths, 4, side), batch_of([8, 6, 2], 5, side), batch_of([8], 6, side)
    g, h, s = (gradients(model, one, is_linear) for one in (batch, other, single))
    engine, seen = fk.Influence(model, LINEAR), sizes_of(model)
    vectors = {n: torch.randn_like(p) for n, p in model.named_parameters() if is_linear(n)}
    v = torch.cat([x.flatten() for x in vectors.values()])
    partner = torch.tensor([0] * 4 + [1] * 4 + [2] * 3)
    asked = {
        "norms": (lambda: engine.norms(batch), g.square().sum(1), 3),
        "direction": (lambda: engine.direction(batch, vectors), g @ v, 3),
        "cross": (lambda: engine.gram(batch, other), g @ h.T, 11),
        "crossed": (lambda: engine.gram(other, batch), h @ g.T, 11),
        "steering": (lambda: engine.steering(batch, other, partner).product, (g * (g - h[partner])).sum(1), 14),
        "alone": (lambda: engine.steering(batch, batch_of(lengths, 4, side)).product, torch.zeros(11), 6),
        "one": (lambda: engine.steering(batch, single).product, (g * (g - s)).sum(1), 12),
        "gram": (lambda: engine.gram(batch), g @ g.T, 3),
    }
    for name, (ask, truth, most) in asked.items():
        for _ in range(2):
            seen.clear()
            answer = ask()
        if name == "alone":
            assert answer.abs().max() < 1e-9 * g.square().sum(1).max()
        else:
            assert error(answer, truth) < 1e-11, name
        assert max(seen) <= most, name
    assert error(engine.sketch(batch, 64), fk.Influence(model, LINEAR, micro_batch=11).sketch(batch, 64)) < 1e-11


def test_two_large_batches_are_held_and_met(small, model):
    batch, other = batch_of([8] * 12, 7), batch_of([5] * 3, 8, width=8)
    g, h = (gradients(model, one, is_linear) for one in (batch, other))
    engine, seen = fk.Influence(model, LINEAR), sizes_of(model)
    engine.norms(other)
    for ask, truth in ((lambda: engine.gram(batch, other), g @ h.T), (lambda: engine.gram(other, batch), h @ g.T)):
        ask()
        seen.clear()
        assert error(ask(), truth) < 1e-11
        assert seen == [3, 6, 6]  # a third piece would form the held ones' gradients a third time


def test_a_whole_model_s_gram_matrix_by_pieces(small, monkeypatch):
    """Embeddings, norms and heads among them, of which some tokens are in one piece alone."""
    model, batch = tiny_llama(13), batch_of([8, 2, 8, 8, 5, 8, 8], 14)
    g = gradients(model, batch, lambda name: True)
    engine, seen = fk.Influence(model), sizes_of(model)
    for _ in range(2):
        seen.clear()
        assert error(engine.gram(batch), g @ g.T) < 1e-6  # a Llama's norms round to fp32
    assert seen == [3, 3, 1]


def test_a_number_is_kept_to(small, model):
    batch, seen = batch_of([8] * 7, 9), sizes_of(model)
    engine = fk.Influence(model, LINEAR, micro_batch=7)
    engine.norms(batch)
    engine.norms(batch)
    assert seen[-1] == 7


def test_an_output_that_knows_examples_by_their_place_has_them_all(small, model):
    """Its labels are the whole batch's: of a piece it would take those of the first examples."""
    batch = batch_of([8] * 9, 10)
    labels = 2 ** torch.arange(9.0, dtype=torch.float64)  # exact also where a norm rounds to fp32
    engine = fk.Influence(model, LINEAR, output=lambda returned: returned.logits[:, 0] * labels[: len(returned.logits)])
    g = gradients(model, batch, is_linear) * labels[:, None]
    for _ in range(2):
        assert error(engine.norms(batch), g.square().sum(1)) < 1e-11
    strict = fk.Influence(model, LINEAR, output=lambda returned: returned.logits[:, 0] * labels)
    for _ in range(2):
        assert error(strict.norms(batch), g.square().sum(1)) < 1e-11
    with pytest.raises(ValueError, match="wanted one floating-point scalar an example"):
        fk.Influence(model, LINEAR, output=lambda returned: returned.logits).norms(batch)


def test_where_nothing_is_known_of_pieces_nothing_is_cut(small, model):
    batch, seen = batch_of([8] * 9, 12), sizes_of(model)
    for options in ({"check": "never"}, {"check": "every"}):
        seen.clear()
        fk.Influence(model, LINEAR, **options).norms(batch)
        assert max(seen) == 9
    fk.Influence(model.bfloat16(), LINEAR).norms(batch)
    assert seen[-1] == 9


@given(st.integers(1, 200), st.integers(1, 600), st.lists(st.integers(0, 6), min_size=200, max_size=200), st.booleans())
def test_slices_cover_and_few_references_run_again(n, width, partners, single):
    partner = torch.zeros(n, dtype=torch.long) if single else torch.tensor(partners[:n])
    batch = {"input_ids": torch.zeros(n, width, dtype=torch.long)}
    references = {"input_ids": torch.zeros(7, width, dtype=torch.long)}
    rule = pieces.Pieces(None, torch.device("cpu"), lambda: True)
    for slices in (rule.of(batch), rule.of_candidates(batch, references, partner)):
        assert [i for rows in slices for i in range(n)[rows]] == list(range(n))
    m, again = len(partner.unique()), sum(len(partner[rows].unique()) for rows in slices)
    assert n + again <= (1 + pieces.RUN_AGAIN) * (n + m) or len(slices) == 1
    sizes = [rows.stop - rows.start for rows in rule.of(batch)]
    assert max(sizes) * width <= max(pieces.TOKENS + width, width)
    met = rule.beside_held(references, batch)
    assert not met or 7 * (len(met) - 1) <= pieces.FORMED_AGAIN * (n + 7) or len(met) == 1
