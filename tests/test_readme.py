"""Every number of the READMEs, and of the pages that go on from them, comes from a file in benchmarks/results."""

import json
import re
import statistics

from benchmarks.cases import attribution, influence, lds, packages, projections, sketch, train_step, ways
from benchmarks.gpu_campaign import table
from fpo_train.cli import main
from tests.pages import RESULTS, ROOT, holds


def read(path):
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def rows(case, device="cpu-2threads"):
    return read(f"{device}/{case}.json")["rows"]


def by_name(case):
    """The rows of a case's first setting."""
    first = rows(case)[0]["setting"]["name"]
    return {row["competitor"]: row for row in rows(case) if row["setting"]["name"] == first}


def test_costs():
    holds("README.md", "\n".join(influence.chart(rows("influence"))))
    gpu = read("nvidia-h200/campaign/engine.json")
    holds("README.md", "\n".join(table.chart(gpu["rows"])))
    holds("docs/kernels.md", f"(ratio {by_name('head')['closed form']['ratio']['median']:.2f} in")
    taken = {}
    for row in rows("influence"):
        taken.setdefault(row["setting"]["name"], {})[row["competitor"]] = row.get("ratio", {}).get("median")
    cpu = [one[influence.HOOKS] / one[influence.OURS] for one in taken.values()]
    ms = {(row["setting"], row["run"]): row["ms"] for row in gpu["rows"] if row.get("ms")}
    h200 = [ms[one, "torch hooks"] / took for (one, run), took in ms.items() if run == "steering"]
    said = f"{min(cpu):.2f} to {max(cpu):.2f} times our time on the CPU, {min(h200):.2f} to {max(h200):.2f} on the GPU"
    holds("README.md", said)


def test_beside_other_packages():
    found = rows("packages")
    holds("README.md", "\n".join(packages.beside(found)))
    holds("README.md", f"How far inner products are off: {'; '.join(packages.projected(found))}.")


def test_projections_at_equal_bytes():
    page, found = "docs/benchmarks.md", rows("projections", "cpu-1threads")
    holds(page, "\n".join(projections.chart(found)))
    holds(page, "\n".join(projections.chart(found, "sum_error")))
    (drawn,) = {
        re.search(r"\d[\d.e+]+", row["reason"])[0]
        for row in found
        if "k=1024" in row["setting"]["name"] and "drawn" in row.get("reason", "")
    }
    holds(page, f"from k = 1024 on draw {drawn} a seed")
    settings = {row["setting"]["dim"]: row["setting"] for row in found}
    assert [settings[k]["slow_seeds"] for k in (64, 256)] == [6, 3]
    holds(page, f"{settings[64]['seeds']} seeds ± its standard error, over six and three of those")
    off = {(row["competitor"], row["setting"]["dim"]): row["figures"]["error"] for row in found if "figures" in row}
    small, large = (off[projections.TENSOR, k] / off[projections.OPORP, k] for k in (64, 4096))
    holds(page, f"({small:.1f} times at 64 numbers, {large:.1f} at 4096 beside OPORP)")


def test_slowdowns_are_told_from_noise():
    found = read("cpu-1threads/compare.json")
    with_it, without = (f"{found[key]} of {found['comparisons']}" for key in ("told_with", "told_without"))
    rounds = [row["rounds"] for row in found["rows"]]
    most = max(row["seconds"] for row in found["rows"])
    said = f"{with_it} slowdowns were told and no change {without} times, after {min(rounds)} to {max(rounds)} rounds"
    holds("docs/benchmarks.md", f"{said} and at most {most:.0f} s")
    assert all(row["right"] for row in found["rows"])


def test_the_linear_environment():
    final = read("linear/summary.json")["linear"]
    none, relaxed = final["none"]["0"], final["relaxed"]["0"]
    for page in ("README.md", "docs/reproduction.md"):
        holds(page, f"utility {none['best_utility']:.2f} and falls to {none['utility']:.2f}")
        holds(page, f"it ends at {relaxed['utility']:.2f} of 10")


def test_the_neural_environment():
    final = read("neural/summary.json")["neural"]
    good = sum(run["utility"] > 9 for run in final["relaxed"].values())
    assert min(run["utility"] for run in final["residual"].values()) > 9.99
    for page in ("README.md", "docs/reproduction.md"):
        holds(page, f"`relaxed` ends above 9 on {good} of ten seeds")
        holds(page, "above 9.99 on all ten")
    assert final["residual"]["0"]["oracle_calls"] == final["none"]["0"]["oracle_calls"]


def test_the_collapse_study():
    page = "README.md"
    found = read("collapse/study.json")
    gold = {kind: {seed: run["gold"] for seed, run in one["final"].items()} for kind, one in found.items()}
    rows = [
        json.loads(path.read_text().splitlines()[0]) for path in (RESULTS / "collapse" / "none").rglob("metrics.jsonl")
    ]
    start = statistics.fmean(row["audit_utility"] for row in rows)
    holds(page, f"falls from {start:.2f} to {statistics.fmean(gold['none'].values()):.2f} nats a token")
    holds(page, f"it ends at {statistics.fmean(gold['relaxed'].values()):.2f}, highest on every")
    holds(page, f"(p = {found['relaxed']['against']['none']['gold']['p']:.3f})")
    assert all(max(gold, key=lambda kind, seed=seed: gold[kind][seed]) == "relaxed" for seed in gold["none"])
    for other in ("practical", "none"):
        against = found["relaxed"]["against"][other]["gold"]
        holds(page, f"{against['mean']:+.2f} [{against['low']:+.2f}, {against['high']:+.2f}] against")


def test_which_way_wins_where():
    page = "fpo_kernels/products/README.md"
    holds(page, "\n".join(ways.chart(rows("ways"))))
    found = ways.regrets(rows("ways"))
    holds(page, f"median {statistics.median(found.values()):.2f} times, at worst {max(found.values()):.2f} times")


def test_the_products_page():
    found = {}
    for row in rows("products"):
        if row["status"] == "timed":
            found.setdefault(row["setting"]["name"], {})[row["competitor"]] = row
    for setting, measured in found.items():
        cells = [f"{1e3 * measured['form G, multiply']['seconds']['median']:.2f} ms"]
        cells += [f"{measured[impl]['ratio']['median']:.2f}" for impl in ("torch", "native")]
        holds("fpo_kernels/products/README.md", f"| {setting} | {' | '.join(cells)} |")


def headlines(case):
    return read(f"cpu-2threads/{case}.json")["headlines"]


def headline(case, text):
    return [one["median"] for one in headlines(case) if one["text"].startswith(text)]


def test_the_sketch_page():
    page = "fpo_kernels/sketch/README.md"
    for figure in ("error", "sum_error", "seconds"):
        holds(page, "\n".join(sketch.chart(rows("sketch"), figure)))
    first, second = sketch.unbiased(rows("sketch"))
    holds(page, f"falls as k^{sketch.slope(rows('sketch')):.2f}. M{first[1:]} {second}")
    for one in headlines("grad_sketch"):
        holds(page, f"| {one['setting']} | {one['median']:.1f} |")


def test_sketches_stores_and_checkpoints():
    page = "docs/kernels.md"
    short, long = (headline("engine_sketch", f"sketch, k = {dim}")[0] for dim in (1024, 4096))
    holds(page, f"{short:.2f} times a forward and activation-only backward at k = 1024 and {long:.2f} at k = 4096")
    (error,) = (x["median"] for x in headlines("sketch") if x["setting"] == "k=1024" and x["text"].endswith("/ LoGra"))
    holds(page, f"errs {error:.2f} times what LoGra's does at k = 1024")
    one, five, twenty = headline("tracin", "TracIn over all checkpoints / one forward")
    holds(page, f"cost {one:.2f}, {five:.2f} and {twenty:.2f} forwards")

    append, top = (
        {r["competitor"]: r for r in rows("store") if r["setting"]["does"] == does} for does in ("append", "top")
    )
    ours = append["fk.SketchStore"]
    a_second = ours["setting"]["rows"] / ours["seconds"]["median"]
    holds(page, f"runs at {a_second:,.0f} rows a second")
    holds(page, f"({headline('store', 'the store / a plain file')[0]:.2f} times a plain file's time)")
    ms = {name: f"{1e3 * row['seconds']['median']:.0f} ms" for name, row in top.items()}
    by_this = {name: f"{(row['rss_bytes'] - row['rss_built_bytes']) / 2**20:.0f} MiB" for name, row in top.items()}
    holds(
        page,
        f"take {ms['fk.SketchStore']} and {by_this['fk.SketchStore']} of memory, against {ms['plain file']} and "
        f"{by_this['plain file']} for a plain file mapped and {ms['whole in memory']} for one read whole",
    )


def test_curvature():
    found = {(row["setting"]["name"], row["competitor"]): row["figures"] for row in rows("exact")}
    head = found["head", "formed gradients"]
    right, off = head["correlation, ε = 0.001"], head["error, ε = 0.001"]
    holds("docs/kernels.md", f"(correlation {right:.4f}, relative error {100 * off:.1f}%, 32 pairs)")
    sketched, formed, without = (
        found["LoRA", way]["rank correlation, ε = 0.001"]
        for way in ("sketch, k = 4096", "formed gradients", "formed, first order")
    )
    off = found["LoRA", "sketch, k = 4096"]["error, ε = 0.001"]
    holds(
        "docs/kernels.md",
        f"rank correlation with retraining is {sketched:.2f} from sketches of 4096 numbers, {formed:.2f} from formed "
        f"gradients and {without:.2f} without curvature; the size of the change is off by {100 * off:.0f}%",
    )


def test_the_attribution_page():
    page = "docs/attribution.md"
    found = rows("attribution", "cpu-1threads")
    holds(page, "\n".join(attribution.chart(found)))
    right = [row["figures"]["accuracy"] for row in found]
    holds(page, f"tells {100 * min(right):.0f} to {100 * max(right):.0f} % of the validation pairs apart")
    planted = {row["setting"]["kind"]: row["setting"]["share"] for row in found}
    holds(page, f"of {100 * planted['label errors']:.0f} % of the training pairs the label is wrong")
    holds(page, f"in {100 * planted['length bias']:.2f} % of all pairs")
    few, more = attribution.AUDITED
    holds(page, f"the most suspected {100 * few:.0f} or {100 * more:.0f} %")
    room = {
        round(few * one["train"]) / round(one["share"] * one["train"])
        for one in (row["setting"] for row in found)
        if one["kind"] == "length bias"
    }
    holds(page, f"no more than {100 * min(room):.0f} to {100 * max(room):.0f} % of them have room in {100 * few:.0f} %")
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


def test_what_influences_foretell():
    page, found = "docs/attribution.md", rows("lds", "cpu-1threads")
    holds(page, "\n".join(lds.chart(found)))
    figures = {(row["setting"]["name"], row["competitor"]): row["figures"] for row in found}
    for name in dict.fromkeys(setting for setting, _ in figures):
        told = {way: figures[name, way]["lds"] for way in lds.WAYS}
        curved, plain = told[lds.CURVED], told[lds.TRACIN]
        assert curved == max(told.values())
        assert plain > told[lds.VECTORS] > told[lds.WORDS] > abs(told[lds.CHANCE]) + 0.1
        assert figures[name, lds.CURVED]["low"] > figures[name, lds.TRACIN]["high"]
        assert (curved - plain < 0.02) == (name == "head, ridge 1")
        assert told[lds.DAMPED] < plain + (0.02 if "LoRA" in name else 0)
    for sizes, name in (((64, 256), "head"), ((256, 4096), "LoRA, ridge 1")):
        for dim, way in zip(sizes, (lds.SMALL, lds.LARGE), strict=True):
            assert figures[name, way]["numbers"] == dim
    head, adapter = (figures[name, lds.TRACIN]["numbers"] for name in ("head", "LoRA, ridge 1"))
    holds(page, f"much with 64 for a head's {head}, almost nothing with 4096 for an adapter's {adapter:,}")
    setting = found[0]["setting"]
    holds(page, f"{setting['subsets']} random halves of {setting['train']} pairs")
    holds(page, f"in the mean over {setting['queries']} held-out pairs")
    holds(page, f"with {100 * lds.SHARE:.0f} % of the labels\nwrong")


def test_what_a_llama_holds(capsys):
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for config in ("llama3_8b_24gb.yaml", "llama3_8b_16gb.yaml", "llama3_8b_8gb.yaml"):
        assert main(["plan", "--config", config]) == 0
        _, table = capsys.readouterr().out.strip().split("\n", 1)
        assert table in page


def test_a_whole_iteration():
    page = "docs/training.md"
    holds(page, "\n".join(train_step.chart(rows("train_step"))))
    short, long, _ = headline("train_step", "the paper's procedure")
    holds(page, f"{short:.2f} times as long as ours on short prompts and {long:.2f} times on long ones")
    head = headline("train_step", "FPO head-only (practical)")[2]
    holds(page, f"takes {head:.2f} of plain RLHF")
    (whole,), (lora,) = (headline("train_step", f"FPO over {what}") for what in ("all weights of MiniLM", "a LoRA"))
    holds(page, f"trained and penalised {whole:.2f}, with a LoRA reward model on the base {lora:.2f}")
    holds(page, f"Replies take {headline('decode', 'ours / transformers')[0]:.2f} of the time of transformers'")
    holds("README.md", f"takes {head:.2f} of plain RLHF's time, with a LoRA reward model {lora:.2f};")
    holds("README.md", f"takes {short:.2f} times as long as ours on short prompts")


def test_the_versions_that_are_served():
    asked = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ndependencies = [\n")[1].split("\n]\n")[0]
    least = dict(re.findall(r'"(\w+)(?:\[\w+\])?>=([\d.]+)', asked))
    floor = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints-floor.txt").read_text(), re.MULTILINE))
    assert len(least) == asked.count('"') // 2
    assert all(floor[name].startswith(version) for name, version in least.items())
    page = "docs/install.md"
    holds(page, f"oldest versions served (transformers {least['transformers']}, peft {least['peft']})")
    holds(page, "below transformers 6,")
    assert '"transformers>=5.0,<6"' in asked


def test_what_scoring_together_saves():
    for row in rows("serving"):
        f = row["figures"]
        speeds = f"{f['requests_per_second']:.0f} | {f['p50_ms']:.0f} | {f['p99_ms']:.0f} | {f['answers']:.0f}"
        holds("docs/serving.md", f"| {row['setting']['name']} | {row['competitor']} | {speeds} |")
