"""What pages say of the H200 is in the files of its campaign, or follows from them."""

import json
import re

from benchmarks.models import SHAPES
from tests.pages import RESULTS, holds

H200 = RESULTS / "nvidia-h200"
ENGINE = json.loads((H200 / "campaign" / "engine.json").read_text(encoding="utf-8"))
MS = {(row["setting"], row["run"]): row["ms"] for row in ENGINE["rows"] if "ms" in row}
RATIO = {(row["setting"], row["run"]): row["ratio"] for row in ENGINE["rows"] if row.get("ratio")}
SETTINGS = ("8+1 of 64", "8+1 of 256", "8+1 of 512")
WEIGHTS = 225  # Linear ones of the 8B model, a tap each
PRODUCTS, SKETCH = "fpo_kernels/products/README.md", "fpo_kernels/sketch/README.md"


def text(name):
    return (H200 / name).read_text(encoding="utf-8")


def number(pattern, name):
    """The number that a file has where the pattern has a group."""
    return float(re.search(pattern, text(name), re.DOTALL)[1])


def test_whole_passes():
    # in brackets what was predicted before the run
    predicted = {"steering": (78, 158, 327), "norms": (77, 154, 312)}
    for run, label in (
        ("forward + backward", "forward + backward"),
        ("forward + backward, captured", "the same captured"),
        ("steering", "**steering, eager**"),
        ("norms", "norms: half the items"),
    ):
        brackets = [f" ({ms})" for ms in predicted.get(run, ())] or [""] * 3
        cells = [f"{MS[setting, run]:.1f}{more}" for setting, more in zip(SETTINGS, brackets, strict=True)]
        holds(PRODUCTS, f"| {label} | {' | '.join(cells)} |")
    short, long = SETTINGS[0], SETTINGS[2]
    a_tap = 1e3 * (MS[short, "steering"] - MS[short, "forward + backward"]) / WEIGHTS
    holds(PRODUCTS, f"a tap costs {round(a_tap, -1):.0f} µs of host time there")
    holds(PRODUCTS, f"At 512 tokens {RATIO[long, 'steering']:.2f} of the pass, not 1.10")
    (again,) = (row for row in ENGINE["rows"] if (row["setting"], row["run"]) == (long, "steering, captured"))
    holds(PRODUCTS, f"Two eager passes differed by {again['error']:.0e} there".replace("e-06", "e-6"))


def test_what_the_campaign_found_wrong():
    (failure,) = ENGINE["failures"]
    counts = json.loads(text("campaign/tests.json"))["rows"][0]["counts"]
    holds("docs/benchmarks.md", f"other bits than the eager pass, by an error of {failure.rpartition('error ')[2]};")
    holds("docs/benchmarks.md", f"ran out of its time after {counts['passed']} tests had passed")


def test_the_products_kernel():
    one, many = (
        number(rf"T=512 \(128, 64, 8, 4, {columns}\): .*?, ([\d.]+) for 32", "tiles.txt") for columns in (0, 256)
    )
    holds(PRODUCTS, f"{one:.1f} ms for 32 blocks by itself")
    holds(PRODUCTS, f"gain nothing at 512 tokens ({many:.1f} ms)")
    one, many = (number(rf"T=256 \(128, 64, 8, 4, {columns}\): ([\d.]+) ms", "tiles.txt") for columns in (0, 256))
    holds(PRODUCTS, f"At 256 tokens they lost by {many / one:.1f}.")
    again = number(r"== T=512 steering:.*?kernel time beside.*?\+([\d.]+) ms x\+32 void .*BinaryFunctor", "profile.txt")
    holds(PRODUCTS, f"making down's input again took {again:.1f} ms")
    beside, alone = (number(rf"T=256 steering{more}: ([\d.]+) ms", "beside.txt") for more in ("", ", not beside"))
    holds(PRODUCTS, f"worth {alone - beside:.0f} ms of {alone:.0f} at 256 tokens")


def test_the_sketch_kernel():
    took = {}
    for dim, what, whole, narrow, wide in re.findall(
        r"^k +(\d+) (\S.*?) +[\d.]+ ms \(x4 +([\d.]+)\)  narrow +([\d.]+)  wide +([\d.]+)",
        text("sketch_variants.txt"),
        re.MULTILINE,
    ):
        took[int(dim), what] = {"whole": float(whole), "narrow": float(narrow), "wide": float(wide)}
    before = [
        number(rf"== T=256 sketch {k}:.*?\+([\d.]+) ms x\+49 grouped_sketch", "profile.txt") for k in (1024, 4096)
    ]
    holds(
        SKETCH, f"| the kernel before ([profile](../../benchmarks/results/nvidia-h200/profile.txt)) | {cells(before)} |"
    )
    for label, what in (
        ("measured", "as it is"),
        ("… without spectra", "no spectrum"),
        ("… without gathering and reading", "no gather, no reads"),
    ):
        holds(SKETCH, f"| {label} | {cells(took[k, what]['whole'] for k in (1024, 4096))} |")
    calls = [", ".join(f"{RATIO[one, f'sketch {k}']:.2f}" for one in SETTINGS) for k in (1024, 4096)]
    holds(SKETCH, f"| whole call at T = 64, 256 and 512 | {' | '.join(calls)} |")

    def gain(dim, what, part="whole"):
        return 100 * (1 - took[dim, what][part] / took[dim, "as it is"][part])

    in_order = max(gain(k, "gather in order") for k in (1024, 4096))
    holds(SKETCH, f"Gathering in order, without bank conflicts, gains {in_order:.0f} %")
    others = [gain(*key) for key in took if key[1].startswith(("CHUNK", "RUN_WORK"))]
    assert max(others) < 4
    holds(SKETCH, "are within 4 % or lose")
    fewer = [gain(k, f"{part}: 8 warps of 255", part) for k, part in ((4096, "narrow"), (1024, "wide"), (4096, "wide"))]
    holds(SKETCH, f"Eight warps of 255 registers beat sixteen of 128 by up to {max(fewer):.0f} %")


def cells(values):
    return " | ".join(f"{ms:.1f} ms" for ms in values)


def test_what_follows_from_the_shape():
    hidden, wide, heads, keys = SHAPES["llama3.1-8b"]
    narrow = hidden * keys // heads
    numbers = 2 * hidden + 2 * narrow + 2 * hidden + hidden + 2 * wide + wide + hidden
    holds(SKETCH, f"down: {numbers:,} numbers a token)")
    reading = 1e3 * 2 * numbers * 9 * 256 * 32 / 4.2e12  # bytes a number, examples, tokens, blocks; bytes a second
    holds(SKETCH, f"| reading the factors would take, at T = 256 | {reading:.1f} ms | {reading:.1f} ms |")
    results = [
        4 * 4096 * (tokens // 8) * 9 * 32 / 1e6 for tokens in (64, 256, 512)
    ]  # a chunk of 8, an example, a block
    holds(SKETCH, "at k = 4096, {:.0f}, {:.0f} and {:.0f} MB".format(*results))
