"""`fpo-train attribute`: influence against gradients formed one by one and against retraining; what is kept of it."""

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fpo_kernels as fk
from fpo_train.cli import main
from fpo_train.config import RewardModelConfig, RunConfig
from fpo_train.processes import Processes
from fpo_train.reward_model.base import fit_logistic
from fpo_train.reward_model.classifier import ClassifierRewardModel

PAIRS = [
    {"prompt": "Name a river.", "chosen": "The Danube.", "rejected": "Water flows."},
    {"prompt": "Why is the sky blue?", "chosen": "Air scatters blue light.", "rejected": "It is.", "preference": 0.8},
    {"prompt": "Say hello.", "chosen": "Good morning to you!", "rejected": "No."},
    {"prompt": "What is two and two?", "chosen": "Four.", "rejected": "Five, I think it is.", "preference": 0.3},
    {"prompt": "Name a tree.", "chosen": "An oak.", "rejected": "A stone."},
    {"prompt": "Where is Rome?", "chosen": "In Italy.", "rejected": "In a book about it."},
    {"prompt": "Who wrote Hamlet?", "chosen": "Shakespeare wrote it.", "rejected": "Nobody knows."},
    {"prompt": "Name a colour.", "chosen": "Green", "rejected": "Seven"},
]
REPLIES = [
    {"id": "a", "prompt": "Name a river.", "reply": "The Rhine, perhaps."},
    {"id": "b", "prompt": "Name a bird.", "reply": "A wren."},
]


@pytest.fixture
def ask(classifiers, tmp_path):
    """The rows of an attribution by influence in the pairs' order: reply id → rows; `told` is the last printed text."""

    def asked(*more, model="bert", pairs=PAIRS, replies=REPLIES, code=0):
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        (tmp_path / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replies))
        words = ["attribute", "--reward_model.model", str(classifiers.get(model, model)), "--top", "0"]
        words += ["--pairs", str(tmp_path / "pairs.jsonl"), "--replies", str(tmp_path / "replies.jsonl")]
        words += ["--out", str(tmp_path / "out"), "--embedder", "reward_model", "--reward_model.input", "pair"]
        assert main([*words, *map(str, more)]) == code
        lines = (tmp_path / "out" / "attributions.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {reply["id"]: {row["pair"]: row for row in rows if row["id"] == reply["id"]} for reply in replies}

    return asked


def matrix(found, column, count=8):
    """(replies, pairs) of a column; what has no influence at all has no row."""
    return torch.tensor([[rows.get(n + 1, {column: 0.0})[column] for n in range(count)] for rows in found.values()])


class Formed:
    """Rewards and gradients formed one by one in float64, over parameters whose names pass."""

    def __init__(self, folder, keep=lambda name: True):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
        self.chosen = [p for name, p in self.model.named_parameters() if keep(name)]

    def one(self, prompt, reply):
        """r, and its gradient in one piece."""
        reward = self.model(**self.tokenizer(prompt, reply, return_tensors="pt")).logits[0, 0]
        parts = torch.autograd.grad(reward, self.chosen, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(self.chosen, parts, strict=True)]
        return reward.detach(), torch.cat([g.flatten() for g in flat])

    def losses(self, pairs=PAIRS):
        """∇ℓ (n, P) by autograd through the loss, u (n, P) and margins (n,)."""
        slopes, differences, margins = [], [], []
        for pair in pairs:
            (first, g), (second, h) = (self.one(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
            margin = (first - second).requires_grad_()
            label = torch.tensor(pair.get("preference", 1.0), dtype=torch.float64)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(margin, label)
            (slope,) = torch.autograd.grad(loss, margin)
            slopes.append(slope * (g - h))
            differences.append(g - h)
            margins.append(margin.detach())
        return torch.stack(slopes), torch.stack(differences), torch.stack(margins)

    def replies(self, replies=REPLIES):
        return torch.stack([self.one(row["prompt"], row["reply"])[1] for row in replies])

    def influence(self, solve=lambda rows: rows):
        """−⟨∇r(z), F⁻¹∇ℓ_j⟩ (m, n), and its cosine."""
        losses, own = self.losses()[0], self.replies()
        found = -solve(own) @ losses.T
        norms = (own * solve(own)).sum(1).sqrt()[:, None] * (losses * solve(losses)).sum(1).sqrt()
        return found, found / norms


def is_head(name):
    return name.endswith(("classifier.weight", "score.weight"))


def no_bias_of_the_head(name):
    return name != "classifier.bias"


def close(found, wanted, within=1e-4):
    assert (found - wanted).norm() < within * wanted.norm()


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_heads_influence_is_the_loop_of_gradients(ask, classifiers, model):
    found, formed = ask(model=model), Formed(classifiers[model], is_head)
    wanted, cosine = formed.influence()
    close(matrix(found, "influence"), wanted)
    close(matrix(found, "cosine"), cosine)
    (row,) = [row for row in found["b"].values() if row["pair"] == 2]
    reward = formed.one(REPLIES[1]["prompt"], REPLIES[1]["reply"])[0]
    assert row["reward"] == pytest.approx(float(reward), abs=1e-4)
    assert row["margin"] == pytest.approx(float(formed.losses()[2][1]), abs=1e-4)
    assert (row["preference"], row["chosen"]) == (0.8, PAIRS[1]["chosen"])


def test_with_curvature_it_is_the_dense_solve(ask, classifiers):
    formed = Formed(classifiers["bert"], is_head)
    _, u, margins = formed.losses()
    gauss = u.T @ (u * (torch.sigmoid(margins) * torch.sigmoid(-margins))[:, None])
    for damping in (0.1, 2.0):
        damped = gauss + damping * gauss.trace() / len(gauss) * torch.eye(len(gauss), dtype=torch.float64)
        wanted, cosine = formed.influence(lambda rows, damped=damped: torch.linalg.solve(damped, rows.T).T)
        found = ask("--curvature", "--damping", damping)
        close(matrix(found, "influence"), wanted, 1e-3)
        close(matrix(found, "cosine"), cosine, 1e-3)


@pytest.mark.parametrize(("model", "parameters"), [("bert", "all"), ("llama", "all"), ("bert", "*.layer.1.*")])
def test_sketches_of_all_weights_are_within_their_error(ask, classifiers, model, parameters):
    chosen = (lambda name: ".layer.1." in name) if "layer" in parameters else no_bias_of_the_head
    formed = Formed(classifiers[model], chosen)
    wanted, _ = formed.influence()
    scale = formed.replies().norm(dim=1)[:, None] * formed.losses()[0].norm(dim=1)
    found = ask("--parameters", parameters, "--dim", 16384, model=model)
    off = (matrix(found, "influence") - wanted) / scale
    assert off.abs().max() < 5 / math.sqrt(16384)  # the sketch's error is about ‖g‖‖∇ℓ‖/√k
    assert off.square().mean().sqrt() < 2 / math.sqrt(16384)


def test_a_reply_that_a_pair_chose_or_rejected_comes_first(ask):
    pair = PAIRS[5]
    replies = [{"id": side, "prompt": pair["prompt"], "reply": pair[side]} for side in ("chosen", "rejected")]
    found = ask("--parameters", "all", replies=replies)
    for side, taught in (("chosen", "like"), ("rejected", "dislike")):
        row = found[side][6]
        assert (row["taught"], row["rank"], row["bm25_rank"], row["embedding_rank"]) == (taught, 1, 1, 1)
        assert row["embedding"] == pytest.approx(1, abs=1e-5)


def fitted(folder, out, pairs, ridge):
    """A classifier whose head is at the optimum over the pairs; Δh (n, H)."""
    config = RunConfig(reward_model=RewardModelConfig(kind="classifier", model=str(folder), input="pair"))
    model = ClassifierRewardModel(config, Processes(), torch.device("cpu"))
    texts = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    hidden = model.read_texts(texts).features.double()
    difference, labels = hidden[::2] - hidden[1::2], torch.tensor([pair.get("preference", 1.0) for pair in pairs])
    weight = fit_logistic(difference, labels, ridge)
    with torch.no_grad():
        model.head.weight.copy_(weight[None])
    whole, tokenizer = model.loaded
    whole.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return difference, labels, weight


def ranked(x):
    return x.argsort().argsort().double()


def test_leaving_a_pair_out_does_what_its_influence_says(ask, classifiers, tmp_path):
    names = ["river", "hill", "tree", "road", "bird"]
    pairs = [
        {
            "prompt": f"Name a {name}.",
            "chosen": f"{name} {n}",
            "rejected": f"{n * n} other",
            "preference": 1.0 - n % 2 / 4,
        }
        for name in names
        for n in range(6)
    ]
    difference, labels, weight = fitted(classifiers["bert"], tmp_path / "fitted", pairs, 0.5)
    ridge = 0.5 * difference.square().sum() / difference.shape[1]  # λ, in the loss's units
    bent = torch.sigmoid(difference @ weight) * torch.sigmoid(-difference @ weight)
    damping = float(ridge * difference.shape[1] / (bent[:, None] * difference.square()).sum())
    reply = Formed(tmp_path / "fitted", is_head).replies()
    changes = []
    for left in range(len(pairs)):
        rest = torch.arange(len(pairs)) != left
        own = ridge * difference.shape[1] / difference[rest].square().sum()
        changes.append((fit_logistic(difference[rest], labels[rest], float(own)) - weight) @ reply.T)
    found = matrix(ask("--curvature", "--damping", damping, model=tmp_path / "fitted", pairs=pairs), "influence", 30)
    for taught, without in zip(found.double(), torch.stack(changes).T, strict=True):
        large = without.abs() > 0.1 * without.abs().max()
        assert bool((taught * -without)[large].gt(0).all())
        assert torch.corrcoef(torch.stack([ranked(taught), ranked(-without)]))[0, 1] > 0.97
        assert torch.corrcoef(torch.stack([taught, -without]))[0, 1] > 0.97


@pytest.fixture
def checkpoints(classifiers, tmp_path):
    """A store of two states of the model's score head and last layer; (folder, how to bring a model to each)."""
    store, states = fk.CheckpointStore(tmp_path / "checkpoints"), []
    model = AutoModelForSequenceClassification.from_pretrained(classifiers["bert"]).requires_grad_(False)
    torch.manual_seed(3)
    chosen = {
        name: p.requires_grad_(True) for name, p in model.named_parameters() if "layer.1" in name or is_head(name)
    }
    for step, rate in ((10, 0.5), (20, 0.25)):
        with torch.no_grad():
            for parameter in chosen.values():
                parameter.add_(0.2 * torch.randn_like(parameter))
        store.save(model, step=step, learning_rate=rate)
        states.append((rate, {name: p.detach().clone().double() for name, p in chosen.items()}))
    return store.folder, states


def test_over_checkpoints_it_is_tracin(ask, classifiers, checkpoints):
    folder, states = checkpoints
    formed, total = Formed(classifiers["bert"], is_head), 0
    own = formed.model.state_dict()
    for rate, weights in states:
        formed.model.load_state_dict({**own, **weights})
        total = total + rate * formed.influence()[0]
    now = ask()
    found = ask("--checkpoints", folder)
    close(matrix(found, "influence"), total)
    assert found["a"][1]["reward"] == now["a"][1]["reward"]
    assert found["a"][1]["margin"] == now["a"][1]["margin"]
    assert matrix(ask(), "influence").equal(matrix(now, "influence"))


def test_what_was_computed_is_found_again(ask, capfd, tmp_path):
    first = ask("--parameters", "*.layer.1.*", "--dim", 64)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "store").rglob("*") if path.is_file()}
    assert "8, 0 of them known" in capfd.readouterr().out
    relabelled = [{**pair, "preference": 0.5} for pair in PAIRS]
    again = ask("--parameters", "*.layer.1.*", "--dim", 64, pairs=relabelled[::-1])
    assert "8, 8 of them known" in capfd.readouterr().out
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "store").rglob("*") if path.is_file()}
    assert again["a"][8]["margin"] == first["a"][1]["margin"]
    longer = [*PAIRS, {**PAIRS[0], "rejected": "The sea."}]
    assert matrix(ask("--parameters", "*.layer.1.*", "--dim", 64, pairs=longer), "influence").equal(
        matrix(first, "influence")
    )
    assert "9, 8 of them known" in capfd.readouterr().out
    ask("--parameters", "*layers.1.*", "--dim", 64, model="llama")
    assert "8, 0 of them known" in capfd.readouterr().out
    ask("--parameters", "*.layer.1.*", "--dim", 64, "--reward_model.max_tokens", 9)
    assert "8, 0 of them known" in capfd.readouterr().out
