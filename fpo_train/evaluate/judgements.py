"""What a table of pairwise judgements says: wins, an interval, a test, by category too. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_train.errors import RunError

REPORT = "report.json"
COLUMNS = ("left", "right", "winner")
ORDERS = ("first_order", "second_order")
WINNERS = ("left", "right", "tie")
NORMAL = 1.959963984540054  # the normal distribution's 97.5 % quantile
NO_CATEGORY = "(none)"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One row: two answers and which of them is better."""

    left: str
    right: str
    winner: str  # "left", "right" or "tie"
    category: str = ""
    orders: tuple[str, str] | None = None  # winner with left shown first, and with right shown first, where both known


def report_command(table: Path, out: Path | None) -> None:
    """Print what the table says and write `report.json`, into `out` or beside the table.

    Raises:
        RunError: see `read_judgements`.
    """
    report = summarize(read_judgements(table))
    print(write_report(report, out or table.parent))


def write_report(report: dict[str, Any], folder: Path) -> str:
    """Write `report.json` into the folder, over an earlier one; returns the report as text."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"{format_report(report)}\nreport: {path}"


def read_judgements(path: Path) -> list[Judgement]:
    """The rows of a CSV file with columns `left`, `right` and `winner`.

    `category`, and `first_order` with `second_order`, are read where they are there; other columns are not.

    Raises:
        RunError: the file cannot be read, is not UTF-8 or no CSV, lacks a column or rows, or a row has a winner that is
            none of left, right and tie.
    """
    lines = _lines(path)
    first, head = next(lines, (0, []))
    if not head:
        raise RunError(f"judgements: {path} is empty")
    columns = [name.strip() for name in head]
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        told = f"wanted {', '.join(COLUMNS)}, got {', '.join(columns)}"
        raise RunError(f"judgements: {path} line {first} has no column {missing[0]}; {told}")
    twice = [name for name in (*COLUMNS, *ORDERS, "category") if columns.count(name) > 1]
    if twice:
        raise RunError(f"judgements: {path} line {first} has the column {twice[0]} twice")
    found = []
    for number, cells in lines:
        where = f"{path} line {number}"
        if len(cells) != len(columns):
            raise RunError(f"judgements: {where} has {len(cells)} columns; line {first} has {len(columns)}")
        found.append(_judgement(dict(zip(columns, cells, strict=True)), where))
    if not found:
        raise RunError(f"judgements: {path} holds no judgements")
    return found


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of the line that each row begins on, and its cells."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RunError(f"judgements: {path} cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise RunError(f"judgements: {path} line {number} is not UTF-8 text") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begun = 1
    try:
        for cells in reader:
            if cells:
                yield begun, cells
            begun = reader.line_num + 1
    except csv.Error as error:
        raise RunError(f"judgements: {path} line {begun} is no CSV: {error}") from error


def _judgement(row: dict[str, str], where: str) -> Judgement:
    orders = [_winner(row[name], name, where) if row.get(name, "").strip() else "" for name in ORDERS]
    return Judgement(
        left=row["left"],
        right=row["right"],
        winner=_winner(row["winner"], "winner", where),
        category=row.get("category", "").strip(),
        orders=(orders[0], orders[1]) if all(orders) else None,
    )


def _winner(text: str, column: str, where: str) -> str:
    winner = text.strip().lower()
    if winner not in WINNERS:
        raise RunError(f"judgements: {where}: {column} is {text!r}; wanted left, right or tie")
    return winner


def summarize(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Wins and ties, win_rate_right = right / (left + right), its Wilson 95 % interval and the two-sided sign test.

    The same by category where there are any. Beside them: `position_bias`, the share of wins of the answer shown first
    among all questions that did not end in a tie, over the `both_orders` pairs that were judged in both orders (0.5
    is none, and None where there are no such questions); `contradictions`, how many of those pairs name the answer
    in one place both times; `identical`, the share of pairs of equal answers; mean lengths in words.
    """
    names = sorted({judgement.category or NO_CATEGORY for judgement in judgements})
    categories = {
        name: _counts([judgement for judgement in judgements if (judgement.category or NO_CATEGORY) == name])
        for name in names
        if names != [NO_CATEGORY]
    }
    orders = [judgement.orders for judgement in judgements if judgement.orders]
    first = sum((one == "left") + (two == "right") for one, two in orders)
    second = sum((one == "right") + (two == "left") for one, two in orders)
    return {
        **_counts(judgements),
        "categories": categories,
        "position_bias": first / (first + second) if first + second else None,
        "both_orders": len(orders),
        "contradictions": sum(order in (("left", "right"), ("right", "left")) for order in orders),
        "identical": _mean(judgements, lambda one: one.left.strip() == one.right.strip()),
        "mean_words_left": _mean(judgements, lambda one: len(one.left.split())),
        "mean_words_right": _mean(judgements, lambda one: len(one.right.split())),
    }


def _counts(judgements: Sequence[Judgement]) -> dict[str, Any]:
    left, right, ties = (sum(one.winner == winner for one in judgements) for winner in WINNERS)
    decided = left + right
    return {
        "wins_left": left,
        "wins_right": right,
        "ties": ties,
        "win_rate_right": right / decided if decided else None,
        "interval": list(wilson(right, decided)) if decided else None,
        "p_value": sign_test(left, right) if decided else None,
    }


def _mean(judgements: Sequence[Judgement], value: Callable[[Judgement], float]) -> float:
    return sum(map(value, judgements)) / len(judgements)


def wilson(wins: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate: (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n), p = wins/n.

    Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    rate, square = wins / n, NORMAL**2 / n
    middle = rate + square / 2
    half = math.sqrt(square * (rate * (1 - rate) + square / 4))
    return max((middle - half) / (1 + square), 0.0), min((middle + half) / (1 + square), 1.0)


def sign_test(left: int, right: int) -> float:
    """Two-sided p of so uneven a split or a more uneven one, were each win a fair coin: exact binomial, ties left out.

    p = min(1, 2 · Σ_{k ≤ min(left, right)} C(n, k) / 2ⁿ), n = left + right; 1 where n is 0.
    """
    n = left + right
    whole = math.lgamma(n + 1) - n * math.log(2)
    tail = math.fsum(math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(min(left, right) + 1))
    return min(1.0, 2 * tail)


def format_report(report: dict[str, Any]) -> str:
    """The report as aligned plain text: a row for all pairs and one a category, then what else was found."""
    head = ("category", "left", "right", "ties", "right wins", "95 % interval", "p")
    rows = [("all", report), *report["categories"].items()]
    table = [head, *(_row(name, numbers) for name, numbers in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]
    words = f"{report['mean_words_left']:.1f} left, {report['mean_words_right']:.1f} right"
    lines += [f"identical answers: {_percent(report['identical'])}; mean length in words: {words}"]
    if report["both_orders"]:
        lines += [
            f"shown first and won: {_percent(report['position_bias'])} of what was decided; "
            f"{report['contradictions']} of {report['both_orders']} pairs judged in both orders contradict themselves"
        ]
    return "\n".join(lines)


def _row(name: str, numbers: dict[str, Any]) -> tuple[str, ...]:
    low, high = numbers["interval"] or (None, None)
    counts = (str(numbers[key]) for key in ("wins_left", "wins_right", "ties"))
    between = "–" if low is None else f"{100 * low:.1f}–{_percent(high)}"
    p = "–" if numbers["p_value"] is None else f"{numbers['p_value']:.2g}"
    return (name, *counts, _percent(numbers["win_rate_right"]), between, p)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
