"""No figure on a page without a file: what tests hold to results, and a short list of what needs none.

A figure that is new on a page fails here until a test `holds` its sentence, or row, with the value from the file. The
test takes all that the tests of pages hold, and looks for what is left (`tests/pages.py` says what a figure is).
"""

import importlib
import inspect
import re

import pytest

from tests import pages

# Whose tests `hold` pages to files; those without fixtures are run here once more.
HOLDING = ("test_readme", "test_reproduction", "test_h200", "fpo_train.test_monitor")

# Versions, titles and intervals: whatever the page, regular expressions.
ANYWHERE = (
    r"(?:torch|Triton|Python|TRL|transformers|peft|pass with)(?: ≥)? \d+\.\d+(?:\.\d+)?",
    r"Triton \d+\.\d+\.\d+ and \d+\.\d+\.\d+",
    r"torch first \(\d+\.\d+ or later\)",
    r"served from \d+\.\d+ on",
    r"\*\*(?:verl|OpenRLHF)\*\* \(\d+\.\d+\)",
    r"arXiv \d{4}\.\d{5}",
    r"95 %(?=,? (?:intervals?|and not widened))",
)

# Words that need no file: settings, definitions, sizes of hardware, what others published. Literally.
ALLOWED = {
    "README.md": ("the model (93 MB)", "wrong by more than 1e-5"),
    "docs/attribution.md": (
        "a rank correlation above 0.97",  # the bound of a test
        "report 47 % of the mislabelled pairs",  # Min et al.
        "AUC of 0.80 for a length bias",  # theirs
    ),
    "docs/benchmarks.md": (  # verdicts of `compare`, as examples, and its settings
        "| `slower by 19 % [14, 25]` | a call takes 19 % longer, and at least 14 %: more than the margin "
        "(`--margin`, 5 %) |",
        "a call takes 20 % less time",
        "by more than 1e-5 (5e-2 in bf16)",
        "twenty times with 20 % more work after every call",
    ),
    "docs/collapse.md": (
        "learning rate, 5e-5,",  # settings, of the study and of what was tried
        "rank 16 at 3e-3",
        "policy 1e-3, head 1e-3",
        "policy 3e-3, head 1e-4",
        "the head at 5e-5",
    ),
    "docs/concepts.md": ("| `none` | 0 |",),  # the penalty of `none`
    "docs/data.md": ("never 0.5;", "(equal replies: 0.5 unasked)", "contradict each other: 0.5)"),  # labels
    "docs/embedding.md": ("by no more than 5 %, one warning",),  # a threshold
    "docs/evaluation.md": ("0.5 is none",),
    "docs/install.md": ("the model (93 MB)", "peft 0.21.2"),
    "docs/kernels.md": ("counting a pair 0.001 more",),  # the experiment
    "docs/memory.md": (
        "Llama 3.1 8B, Llama 3.2 1B and 3B",
        "within 10 % of what live tensors take by tests",  # the bound of tests
        "and in 16 GB,",
        "in 8 GB,",
    ),
    "docs/penalties.md": (  # labels a prompt
        "| `none` | 0 | 1 |",
        "u(z)⟩ | 1 |",
    ),
    "docs/reproduction.md": (
        "ℓ ∈ {0.25, 0.5, 1, 2, 4, 8} times",  # the grid
        "λ ∈ {1e-4, 1e-3, 1e-2, 1e-1}",
        "loses updates of 5e-5",
        "(reference, further seeds: 3.39 on 10, 7.24 on 12)",  # of the published procedure, as are all references
        "ends at 9.94, 9.96 and 9.89 on the linear seeds 0–2 and at 10.00 on the neural ones (reference figures); "
        "a fixed ℓ of twice the median distance at 9.63, 9.22 and 9.84.",
    ),
    "docs/serving.md": ("over 64 × `limits.body`", "127.0.0.1"),
    "fpo_kernels/direction/README.md": (
        "at most 64 MiB (`SCRATCH_BYTES`)",
        # foretold
        "0.20 ms for 4096 to 4096, plus two small launches; three times the product alone (0.07 ms)",
    ),
    "fpo_kernels/products/README.md": (
        "at most 64 MiB (`SCRATCH_BYTES`)",  # sizes of tiles and scratch
        "at most 64 MiB, and a few numbers a pair",
        "at most 32 MiB of them",
        "at most 32 MiB, 800 bytes a pair",
        "500 tiles of 8 MiB",
        "tiles of all examples take 16 MiB together",
        "others copied, 8 MiB of a's rows",
        "or 384 MiB have come together",
        "forms one for every 3.2 pairs",  # 128 pairs by 40 that are formed
        "(predicted: 5, 30 and 110 ms for the kernel)",
    ),
    "fpo_kernels/sketch/README.md": (
        "| 32 MiB (`SCRATCH_BYTES`)",
        "132 processors · 1.7 GHz = 2.2e11 elements a second",  # an H200
        "meet in 32 banks 3.5 deep",  # of random words
        "(80,000 entries / 32 · 3.5: 9,000,",
        "at 2048 a cycle, 8 times: 10,000)",
        "and 2.8 times that.",  # predicted
        "| kernels at T = 256, predicted | 3.1 to 8.7 ms | 4.6 to 12.9 ms |",
    ),
}

# Said by no file here: measured once, and not kept. Each wants to be measured again, or to be taken out.
WITHOUT_A_FILE = {
    "docs/collapse.md": (
        # trials before the study
        "| 0.06 → 0.79 | −1.12 → −0.93 |",
        "| 0.92 → 2.32 | −2.40 → −4.11 |",
        "| −1.98 → −1.30, best −0.14 | −1.91 → −3.57 |",
        "| −0.35 → 0.81 | −1.96 → −8.14 |",
        "72 minutes on two cores",
    ),
    "docs/embedding.md": (  # simulated; the same table is in `fpo_train.report.watch`, held to this one by a test
        "| noise, autocorrelation 0.5 |",
        "| 36 % | 76 % | 100 %, 25 iterations | 100 %, 12 iterations |",
        "| 6.5 % | 51 % | 98 %, 39 iterations | 100 %, 15 iterations |",
        "| 1.4 % | 35 % | 99 %, 39 iterations | 100 %, 15 iterations |",
        "| 0.4 % | 23 % | 100 %, 31 iterations | 100 %, 20 iterations |",
        "rarer: 0.1 % of runs where it is half of the variance",
    ),
    "fpo_kernels/direction/README.md": (  # a Triton kernel that was taken out
        "(0.38 against 0.20 ms for 4096 to 4096 at 128 tokens an example, 0.81 against 0.33 to 14336, "
        "0.41 against 0.16 for a LoRA factor)",
    ),
    "fpo_kernels/products/README.md": (  # on an H200, as are the rates of `fpo_kernels.cost`
        "(up to 946 ms a layer there:",
        "0.79 and 1.55 for 4096 to 4096 + 1024 + 1024, 3.28 and 6.37 for 4096 to 2 × 14336, 0.18 and 0.18 for a LoRA",
        "runs at 663 of 767 TFLOP/s",
    ),
    "fpo_kernels/sketch/README.md": (  # counted in binaries, and clocks of the kernel before
        "| 23 | 11 to 12 | 25 | 10 to 12 |",
        "| 472 | 324 | 394 | 193 |",
        "| 1180 | 565 | 1180 | 780 |",
        "| 584 | 250 to 290 | 550 to 740 | 320 to 466 |",
        "| 12 | 6 | 8 to 12 | 4 to 6 |",
        "| 4 | 1 | 4 | 1 |",
        "| 38,700 | 18,900 | 48,000 | 28,100 |",
        "(278 KB, 14,900 at a processor's share of 4.2 TB/s)",
        "110,000 cycles at k = 1024 (18 ms) and 140,000 at 4096 (23 ms), 2.8 times its issue",
    ),
}


@pytest.fixture(scope="module")
def held():
    """Everything that the tests of pages hold, whichever of them have run in this process."""
    modules = [importlib.import_module(f"tests.{name}") for name in HOLDING]
    with pages.noting():
        for test in (one for module in modules for one in vars(module).values() if inspect.isfunction(one)):
            if test.__name__.startswith("test_") and holds_pages(test):
                test()


def holds_pages(test):
    return "holds(" in inspect.getsource(test) and not inspect.signature(test).parameters


def without_a_file(page):
    return [re.escape(words) for listed in (ALLOWED, WITHOUT_A_FILE) for words in listed.get(page, ())]


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_figure_is_in_a_file(held, page):
    left = pages.unheld(page, [*ANYWHERE, *without_a_file(page)])
    assert not left, "\n".join([f"{page}: no test holds these to a file (tests/test_numbers.py):", *left])


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_lists_are_no_longer_than_they_have_to_be(page):
    """What a page no longer says, or what has no figure, is taken off."""
    for listed in (ALLOWED, WITHOUT_A_FILE):
        for words in listed.get(page, ()):
            assert words in pages.said(page)
            assert re.search(r"\d", words)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("takes 108 ms and 13 MiB, against 0.99 of 3 rows", ["108", "13", "0.99"]),
        ("84 to 89 % of the 60 pairs, 5, 30 and 110 ms", ["84", "89", "5", "30", "110"]),
        ("by +3.33 [-0.32, +6.97] and −0.46, an error of 3.0e-06", ["+3.33", "-0.32", "+6.97", "−0.46", "3.0e-06"]),
        ("3.95 times as long, 209,322 rows a second", ["3.95", "209,322"]),
        ("| 8+1 of 64 | 93.6 (78) | 1.65, 1.07 | 18 ms |", ["93.6", "78", "1.65", "1.07", "18"]),
        ("| MiniLM | 0.314 ± 0.010 | – | 26173 |", ["0.314", "0.010", "26173"]),
        ("| **12** | 1.00 (1.0) |", ["1.00", "1.0"]),
        ("16 queries of 200 tokens, `k = 0.5`, [a 64×64 tile](of/1.5/x.md) on 4 × 2 warps, Llama-3.1-8B", []),
    ],
)
def test_what_a_figure_is(words, found):
    assert [figure for _, figure in pages.figures(words)] == found


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_changed_digit_is_seen(held, monkeypatch, page):
    """Whichever figure it is in, but for versions."""
    before = pages.blocks(page)
    for place, block in enumerate(before):
        anywhere = [match.span() for pattern in ANYWHERE for match in re.finditer(pattern, block)]
        for start, figure in pages.figures(block):
            if not any(first <= start < last for first, last in anywhere):
                changed = block[:start] + another(figure) + block[start + len(figure) :]
                after = [*before[:place], changed, *before[place + 1 :]]
                monkeypatch.setattr(pages, "blocks", lambda page, after=after: after)
                assert pages.unheld(page, [*ANYWHERE, *without_a_file(page)]), changed


def another(figure):
    """The same with another last digit."""
    return re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), figure)
