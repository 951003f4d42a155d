"""README and docs/ as a site: built without a warning, all public names in it, refusals in the words of the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
)

import fpo_kernels as fk
import fpo_train
from tests.fpo_kernels.tiny import batch_of, tiny_llama

ROOT = Path(__file__).parent.parent
KERNELS = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that mkdocs writes; where it is missing this fails, as any test of what is installed does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_it_builds_and_asks_for_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert site / "index.html" in pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="([^"]+)|<link[^>]*href="([^"]+)', text)
        assert not [one for one in loaded if re.match(r"(?:https?:)?//", one[0] or one[1])], page


def test_every_page_is_in_its_contents():
    asked = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\nmarkdown_extensions")[0]
    listed = set(re.findall(r"(\S+\.md)$", asked, re.MULTILINE))
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    there |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fpo_kernels").glob("*/README.md")}
    assert listed == there | {"README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/NOTES.md"}


@pytest.mark.parametrize(("package", "page"), [(fk, "kernels"), (fpo_train, "training")])
def test_every_public_name_has_its_place_in_the_api(site, package, page):
    public = {f"{package.__name__}.{name}" for name in package.__all__ if not name.startswith("_")}
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: (\S+)$", text, re.MULTILINE)) == public
    built = (site / "docs" / "api" / f"{page}.html").read_text(encoding="utf-8")
    for name in public:
        assert f'id="{name}"' in built
        described = built.split(f'id="{name}"')[1].split("doc-contents")[1]
        assert re.match(r"[^>]*>\s*<p>\S", described), name


def test_lists_are_lists(site):
    """Markdown of the site wants a blank line before a list; where it is missing the items run on in a paragraph."""
    for page in (*site.glob("*.html"), *(site / "docs").rglob("*.html")):
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.findall(r"<p>[^<]*\n- .*", text), page
        assert not re.findall(r"<p>\|.*", text), page


def of(model, parameters="all", **options):
    return fk.Influence(model.eval(), parameters, **options)


def ran(model, chosen="all"):
    return of(model, chosen).norms({"input_ids": torch.ones(3, 7, dtype=torch.long)})


def mixture():
    widths = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=20, pad_token_id=0, num_labels=1, **widths, **heads)
    return MixtralForSequenceClassification(config)


def deberta():
    widths = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    places = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    config = DebertaV2Config(vocab_size=20, num_labels=1, position_buckets=4, **widths, **places)
    return DebertaV2ForSequenceClassification(config)


def hooked():
    model = tiny_llama()
    model.score.weight.register_hook(lambda gradient: 2 * gradient)
    return model


def packed():
    model = tiny_llama()
    model.packed = nn.Linear(2, 2)
    model.packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    return model


def two_labels():
    model = tiny_llama()
    model.score = nn.Linear(model.score.in_features, 2, bias=False, dtype=torch.float64)
    return model


class FSDPModule(nn.Linear):
    """By this name sharded modules are known."""


def within_inference_mode():
    with torch.inference_mode():
        of(tiny_llama()).norms(batch_of([3]))


REFUSED = {
    "no rule for MixtralExperts.gate_up_proj": lambda: of(mixture()),
    "no rule for Conv1d.weight": lambda: of(nn.Sequential(nn.Conv1d(2, 2, 3))),
    "wanted the batch of 3 examples in the first dimension": lambda: ran(deberta()),
    "a hook on it (register_hook) changes its gradient as it arrives": lambda: of(hooked()),
    "drops activations at random or mixes examples in train mode": lambda: fk.Influence(
        nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    ).norms({"input": torch.ones(2, 2)}),
    "a torch.uint8 weight has no gradient": lambda: of(packed()),
    "is compiled and taps cannot see inside it": lambda: of(torch.compile(tiny_llama(), backend="eager")),
    "is FSDP-sharded; pass an unsharded model": lambda: of(nn.Sequential(FSDPModule(2, 2))),
    "needs a backward pass": within_inference_mode,
    "wanted (B, 1)": lambda: of(two_labels()).norms(batch_of([3, 4])),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refusals_read_as_the_page_says(said):
    assert f"`{said}" in " ".join(KERNELS.split())
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(said)):
        REFUSED[said]()


def test_what_the_fallback_is_said_to_do():
    """A mixture's experts and router, and those alone, take a backward an example; the rest is as without them."""
    model = mixture().eval()
    batch = {"input_ids": torch.randint(1, 20, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    engine = of(model, fallback="per_example")
    alone = {row.parameter for row in engine.coverage() if row.rule == "per_example"}
    assert alone == {name for name, _ in model.named_parameters() if "experts" in name or "mlp.gate" in name}
    rest = of(model, lambda name, p: name not in alone)
    apart = of(model, lambda name, p: name in alone, fallback="per_example")
    assert torch.allclose(engine.norms(batch), rest.norms(batch) + apart.norms(batch), rtol=1e-4)


def test_the_help_of_make_has_a_line_for_it():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^docs: .*## \S+", text, re.MULTILINE)
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["docs_dir"] == "docs"
