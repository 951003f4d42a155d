"""Every number of the READMEs, and of the pages that go on from them, comes from a file in benchmarks/results."""

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.cases import attribution, influence, sketch, train_step, ways
from benchmarks.gpu_campaign import table
from fpo_train.cli import main

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def prose(path):
    """A page's text without its line breaks."""
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


def rows(case):
    return json.loads((RESULTS / "cpu-2threads" / f"{case}.json").read_text())["rows"]


def by_name(case):
    """The rows of a case's first setting."""
    first = rows(case)[0]["setting"]["name"]
    return {row["competitor"]: row for row in rows(case) if row["setting"]["name"] == first}


def test_costs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(influence.chart(rows("influence"))) in readme
    gpu = json.loads((RESULTS / "nvidia-h200" / "campaign" / "engine.json").read_text())
    assert "\n".join(table.chart(gpu["rows"])) in readme
    assert f"(ratio {by_name('head')['closed form']['ratio']['median']:.2f} in" in prose("docs/kernels.md")
    taken = {}
    for row in rows("influence"):
        taken.setdefault(row["setting"]["name"], {})[row["competitor"]] = row.get("ratio", {}).get("median")
    cpu = [one[influence.HOOKS] / one[influence.OURS] for one in taken.values()]
    ms = {(row["setting"], row["run"]): row["ms"] for row in gpu["rows"] if row.get("ms")}
    h200 = [ms[one, "torch hooks"] / took for (one, run), took in ms.items() if run == "steering"]
    said = f"{min(cpu):.2f} to {max(cpu):.2f} times our time on the CPU, {min(h200):.2f} to {max(h200):.2f} on the GPU"
    assert said in prose("README.md")


@pytest.mark.parametrize("page", ["README.md", "docs/reproduction.md"])
def test_the_linear_environment(page):
    said = prose(page)
    final = json.loads((RESULTS / "linear" / "summary.json").read_text())["linear"]
    none, relaxed = final["none"]["0"], final["relaxed"]["0"]
    assert f"utility {none['best_utility']:.2f} and falls to {none['utility']:.2f}" in said
    assert f"it ends at {relaxed['utility']:.2f} of 10" in said


@pytest.mark.parametrize("page", ["README.md", "docs/reproduction.md"])
def test_the_neural_environment(page):
    said = prose(page)
    final = json.loads((RESULTS / "neural" / "summary.json").read_text())["neural"]
    good = sum(run["utility"] > 9 for run in final["relaxed"].values())
    assert f"`relaxed` ends above 9 on {good} of ten seeds" in said
    assert min(run["utility"] for run in final["residual"].values()) > 9.99
    assert final["residual"]["0"]["oracle_calls"] == final["none"]["0"]["oracle_calls"]


def test_the_collapse_study():
    readme = prose("README.md").split("## Two commands")[0]
    found = json.loads((RESULTS / "collapse" / "study.json").read_text())
    gold = {kind: {seed: run["gold"] for seed, run in one["final"].items()} for kind, one in found.items()}
    rows = [
        json.loads(path.read_text().splitlines()[0]) for path in (RESULTS / "collapse" / "none").rglob("metrics.jsonl")
    ]
    start = statistics.fmean(row["audit_utility"] for row in rows)
    assert f"falls from {start:.2f} to {statistics.fmean(gold['none'].values()):.2f} nats a token" in readme
    assert f"it ends at {statistics.fmean(gold['relaxed'].values()):.2f}, highest on every" in readme
    assert f"(p = {found['relaxed']['against']['none']['gold']['p']:.3f})" in readme
    assert all(max(gold, key=lambda kind, seed=seed: gold[kind][seed]) == "relaxed" for seed in gold["none"])
    for other in ("practical", "none"):
        against = found["relaxed"]["against"][other]["gold"]
        assert f"{against['mean']:+.2f} [{against['low']:+.2f}, {against['high']:+.2f}] against" in readme


def test_which_way_wins_where():
    page = (ROOT / "fpo_kernels" / "products" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(ways.chart(rows("ways"))) in page
    found = ways.regrets(rows("ways"))
    assert f"median {statistics.median(found.values()):.2f} times, at worst {max(found.values()):.2f} times" in page


def test_the_products_page():
    page = (ROOT / "fpo_kernels" / "products" / "README.md").read_text(encoding="utf-8")
    found = {}
    for row in rows("products"):
        if row["status"] == "timed":
            found.setdefault(row["setting"]["name"], {})[row["competitor"]] = row
    for setting, measured in found.items():
        cells = [f"{1e3 * measured['form G, multiply']['seconds']['median']:.2f} ms"]
        cells += [f"{measured[impl]['ratio']['median']:.2f}" for impl in ("torch", "native")]
        assert f"| {setting} | {' | '.join(cells)} |" in page


def headline(case, text):
    found = json.loads((RESULTS / "cpu-2threads" / f"{case}.json").read_text())["headlines"]
    return [one["median"] for one in found if one["text"].startswith(text)]


def test_the_sketch_page():
    page = (ROOT / "fpo_kernels" / "sketch" / "README.md").read_text(encoding="utf-8")
    for figure in ("error", "sum_error", "seconds"):
        assert "\n".join(sketch.chart(rows("sketch"), figure)) in page
    assert f"falls as k^{sketch.slope(rows('sketch')):.2f}" in page
    for gain in headline("grad_sketch", "plain torch / native"):
        assert f"| {gain:.1f} |" in page


def test_sketches_stores_and_checkpoints():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for dim in (1024, 4096):
        cost, *_ = headline("engine_sketch", f"sketch, k = {dim}")
        assert f"{cost:.2f} " in page.split("## Sketches")[1]
    for cost in headline("tracin", "TracIn over all checkpoints / one forward"):
        assert f"{cost:.2f}" in page.split("## Sketches")[1]
    for row in rows("store"):
        assert f"{1e3 * row['seconds']['median']:,.0f} ms" in page or row["setting"]["does"] == "append"
    for row in rows("exact"):
        rank = row["figures"]["rank correlation, ε = 0.001"]
        if row["setting"]["name"] == "LoRA" and row["competitor"] in ("formed gradients", "sketch, k = 4096"):
            assert f"{rank:.2f} from " in page


def test_the_attribution_page():
    page = (ROOT / "docs" / "attribution.md").read_text(encoding="utf-8")
    found = json.loads((RESULTS / "cpu-1threads" / "attribution.json").read_text())["rows"]
    assert "\n".join(attribution.chart(found)) in page
    right = [row["figures"]["accuracy"] for row in found]
    assert f"tells {100 * min(right):.0f} to {100 * max(right):.0f} % of the validation pairs apart" in prose(
        "docs/attribution.md"
    )
    auc = {(row["setting"]["name"], row["competitor"]): row["figures"]["AUC"] for row in found}
    for setting in {row["setting"]["name"] for row in found}:
        plain = auc[setting, attribution.PLAIN]
        assert plain > max(
            auc[setting, attribution.WORDS], auc[setting, attribution.CHANCE], auc[setting, attribution.BENT]
        )
        assert abs(plain - auc[setting, attribution.COSINE]) < 0.05
    assert max(auc[key] for key in auc if key[0] == "length bias, LoRA") == auc["length bias, LoRA", attribution.PLAIN]
    for kind in ("label errors", "length bias"):
        plain = auc[f"{kind}, head", attribution.PLAIN]
        assert min(auc[f"{kind}, head", way] for way in (attribution.LOSS, attribution.VECTORS)) > plain


def test_what_a_llama_holds(capsys):
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for config in ("llama3_8b_24gb.yaml", "llama3_8b_16gb.yaml", "llama3_8b_8gb.yaml"):
        assert main(["plan", "--config", config]) == 0
        _, table = capsys.readouterr().out.strip().split("\n", 1)
        assert table in page


def test_a_whole_iteration():
    page, said = (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), prose("docs/training.md")
    assert "\n".join(train_step.chart(rows("train_step"))) in page
    short, long, _ = headline("train_step", "the paper's procedure")
    assert f"{short:.2f} times as long as ours on short prompts and {long:.2f} times on long ones" in said
    head = headline("train_step", "FPO head-only (practical)")[2]
    assert f"{head:.2f} of plain RLHF" in said
    (whole,), (lora,) = (headline("train_step", f"FPO over {what}") for what in ("all weights of MiniLM", "a LoRA"))
    assert f"trained and penalised {whole:.2f}, with a LoRA reward model on the base {lora:.2f}" in said
    assert f"Replies take {headline('decode', 'ours / transformers')[0]:.2f} of the time of transformers'" in said
    readme = prose("README.md")
    assert f"takes {head:.2f} of plain RLHF's time, with a LoRA reward model {lora:.2f};" in readme
    assert f"takes {short:.2f} times as long as ours on short prompts" in readme


def test_the_versions_that_are_served():
    asked = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ndependencies = [\n")[1].split("\n]\n")[0]
    least = dict(re.findall(r'"(\w+)(?:\[\w+\])?>=([\d.]+)', asked))
    floor = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints-floor.txt").read_text(), re.MULTILINE))
    assert len(least) == asked.count('"') // 2
    assert all(floor[name].startswith(version) for name, version in least.items())
    said = prose("docs/install.md")
    assert f"oldest versions served (transformers {least['transformers']}, peft {least['peft']})" in said
    assert "below transformers 6," in said
    assert '"transformers>=5.0,<6"' in asked


def test_what_scoring_together_saves():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for row in rows("serving"):
        f = row["figures"]
        speeds = f"{f['requests_per_second']:.0f} | {f['p50_ms']:.0f} | {f['p99_ms']:.0f} | {f['answers']:.0f}"
        assert f"| {row['setting']['name']} | {row['competitor']} | {speeds} |" in page
