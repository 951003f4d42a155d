"""Pages of README and docs: their words, which of them a test has held to a file, and the figures that none has.

A figure is a number that says how much: one with a decimal point or an exponent, one before a unit (also in a list, "84
to 89 %"), or a number alone in a cell of a table. Code, links and headings are not looked at.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "fpo_kernels").glob("*/README.md")),
)
HELD = defaultdict(set)  # page → what `holds` was asked for
_noting = False

NUMBER = r"(?<![\w.,/^√=_-])[+−±-]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-?\d+)?(?![\w-])"
UNIT = (
    r"(?:[mµn]?s|seconds?|minutes?|hours?|[KMGT]i?B|[GT]B/s|[GT]FLOP/s|times|forwards|rows a second|nats|%|×)"
    r"(?!\w|\s\d)"
)
# "108 ms", "84 to 89 %", "5, 30 and 110 ms", "663 of 767 TFLOP/s"; a list of layer sizes is none: "64×64"
MEASURED = re.compile(rf"{NUMBER}(?=(?:(?:,| to| and| or| of|,? and)? {NUMBER})*[ ]?{UNIT})")
PRECISE = re.compile(NUMBER)
ALONE = re.compile(rf"^\**(?:{NUMBER}|[\s\[\](),–±%*:]|to|and|{UNIT})+$")


def words(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())


@cache
def blocks(page: str) -> list[str]:
    """A page's paragraphs and rows of tables, in order, each on one line; headings and code blocks are left out."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(?:#.*|    \S.*)$", "", text, flags=re.MULTILINE)  # formulas are set apart by four spaces
    text = re.sub(r"^(\|.*\|)$", r"\n\1\n", text, flags=re.MULTILINE)
    return [words(block) for block in re.split(r"\n\s*\n", text) if block.strip()]


def said(page: str) -> str:
    """All that a page says, its blocks one after the other."""
    return " ".join(blocks(page))


def holds(page: str, text: str) -> None:
    """The page says this, which the caller has from a file: a phrase, or rows of a table that follow one another."""
    assert _noting or words(text) in said(page), f"{page} does not say: {words(text)}"
    HELD[page] |= {words(line) for line in text.splitlines()} if text.startswith("|") else {words(text)}


@contextmanager
def noting() -> Iterator[None]:
    """What is held within is noted, whether a page says it or not: that is for the test that holds it to tell."""
    global _noting
    _noting = True
    try:
        yield
    finally:
        _noting = False


def figures(block: str) -> list[tuple[int, str]]:
    """(place, figure) in a block."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", lambda found: " " * len(found[0]), block)
    found = {match.start(): match[0] for match in MEASURED.finditer(plain)}
    found |= {match.start(): match[0] for match in PRECISE.finditer(plain) if re.search(r"\.|e-?\d", match[0])}
    if block.startswith("|"):
        for cell in list(re.finditer(r"[^|]+", plain))[1:]:  # the first names the row
            if ALONE.match(cell[0].strip()):
                found |= {cell.start() + match.start(): match[0] for match in PRECISE.finditer(cell[0])}
    return sorted(found.items())


def unheld(page: str, allowed: list[str]) -> list[str]:
    """A page's figures that no test has held to a file, each with the words around it.

    Args:
        allowed: words that need no file; regular expressions.
    """
    text, place, left = said(page), 0, []
    spans = [match.span() for held in HELD[page] for match in re.finditer(re.escape(held), text)]
    spans += [match.span() for pattern in allowed for match in re.finditer(pattern, text)]
    for block in blocks(page):
        for start, figure in figures(block):
            begin = place + start
            if not any(first <= begin and begin + len(figure) <= last for first, last in spans):
                left.append(f"{figure}: …{text[max(0, begin - 60) : begin + len(figure) + 40]}…")
        place += len(block) + 1
    return left
