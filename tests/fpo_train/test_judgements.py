"""`fpo-train report`: counts, interval, test and categories of a table of judgements, and what it refuses."""

import csv
import json
import math
import subprocess
import sys
from fractions import Fraction

import pytest

from fpo_train.cli import main
from fpo_train.evaluate.judgements import NORMAL, Judgement, sign_test, summarize, wilson

FIELDS = {"wins_left", "wins_right", "ties", "win_rate_right", "interval", "p_value"}


def table(path, rows, columns=("left", "right", "winner")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def counted(left, right, ties):
    answers = ("some answer", "another answer")
    return [(*answers, "left")] * left + [(*answers, "right")] * right + [(*answers, "tie")] * ties


def report(path, *more):
    assert main(["report", "--judgements", str(path), *map(str, more)]) == 0
    return json.loads((path.parent / "report.json").read_text())


@pytest.mark.parametrize(
    ("left", "right", "ties", "rate", "interval", "p"),
    [  # the published rows (arXiv 2605.04266): baseline – relaxed, baseline – practical, practical – relaxed
        (144, 188, 485, 0.566, (0.512, 0.619), 0.018),
        (135, 140, 542, 0.509, (0.450, 0.568), 0.81),
        (138, 167, 512, 0.548, (0.491, 0.602), 0.11),
    ],
)
def test_the_published_comparisons(tmp_path, capsys, left, right, ties, rate, interval, p):
    found = report(table(tmp_path / "judgements.csv", counted(left, right, ties)))
    assert (found["wins_left"], found["wins_right"], found["ties"]) == (left, right, ties)
    assert found["win_rate_right"] == right / (left + right) == pytest.approx(rate, abs=5e-4)
    assert found["interval"] == pytest.approx(interval, abs=5e-4)
    assert float(f"{found['p_value']:.2g}") == p
    assert found["categories"] == {}
    assert set(found) >= FIELDS
    shown = capsys.readouterr().out
    for word in (str(left), str(right), str(ties), f"{100 * rate:.1f} %", f"{p}"):
        assert word in shown


def test_the_sign_test_is_the_binomial_s():
    for left, right in [(m, n) for m in range(12) for n in range(12)] + [(144, 188), (900, 1000), (3, 200)]:
        n = left + right
        tail = Fraction(sum(math.comb(n, k) for k in range(min(left, right) + 1)), 2**n)
        assert sign_test(left, right) == pytest.approx(float(min(1, 2 * tail)), rel=1e-11)
    assert sign_test(0, 5000) == pytest.approx(0, abs=1e-300)


def test_wilson_s_bounds_are_where_the_score_is_z():
    for wins, n in ((188, 332), (1, 7), (50, 50), (0, 3)):
        low, high = wilson(wins, n)
        assert 0 <= low < high <= 1
        for bound in {low, high} - {0.0, 1.0}:
            assert abs(wins / n - bound) / math.sqrt(bound * (1 - bound) / n) == pytest.approx(NORMAL)
    assert wilson(0, 3)[0] == 0
    assert wilson(50, 50)[1] == 1


def test_categories_have_the_same_fields(tmp_path, capsys):
    rows = [("a", "b", "left", "law")] * 3 + [("a", "b", "right", "health")] * 2 + [("a", "b", "tie", "")]
    found = report(table(tmp_path / "t.csv", rows, ("left", "right", "winner", "category")))
    assert list(found["categories"]) == ["(none)", "health", "law"]
    assert all(set(one) == FIELDS for one in found["categories"].values())
    assert found["categories"]["law"]["wins_left"] == 3
    assert found["categories"]["health"] == {
        "wins_left": 0, "wins_right": 2, "ties": 0, "win_rate_right": 1.0,
        "interval": pytest.approx([0.342, 1.0], abs=1e-3), "p_value": pytest.approx(0.5),
    }  # fmt: skip
    assert found["categories"]["(none)"] == dict.fromkeys(FIELDS) | {"wins_left": 0, "wins_right": 0, "ties": 1}
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[:5]] == ["category", "all", "(none)", "health", "law"]
    blank = table(tmp_path / "blank.csv", [("a", "b", "tie", " ")], ("left", "right", "winner", "category"))
    assert report(blank)["categories"] == {}


def test_lengths_and_identical_answers():
    rows = [("one two three", "one", "left"), ("same answer", " same answer\n", "tie"), ("", "x y", "right")]
    found = summarize([Judgement(left=a, right=b, winner=w) for a, b, w in rows])
    assert found["identical"] == pytest.approx(1 / 3)
    assert found["mean_words_left"] == pytest.approx(5 / 3)
    assert found["mean_words_right"] == pytest.approx(5 / 3)


def test_position_bias(tmp_path, capsys):
    columns = ("left", "right", "winner", "first_order", "second_order")
    rows = [
        ("a", "b", "tie", "left", "right"),  # the first shown, both times
        ("a", "b", "tie", "left", "right"),
        ("a", "b", "left", "left", "left"),  # left, wherever it stood
        ("a", "b", "right", "right", "tie"),  # right where it was shown second, and a tie
        ("a", "a", "tie", "", ""),  # equal: not asked about
    ]
    found = report(table(tmp_path / "t.csv", rows, columns))
    assert found["position_bias"] == pytest.approx(5 / 7)
    assert (found["both_orders"], found["contradictions"]) == (4, 2)
    assert "71.4 %" in capsys.readouterr().out
    for some in (columns[:3], columns[:4]):
        found = report(table(tmp_path / "t.csv", [row[: len(some)] for row in rows], some))
        assert found["position_bias"] is None
        assert found["both_orders"] == 0
    assert "shown first" not in capsys.readouterr().out


def test_tables_as_programs_write_them(tmp_path):
    text = '\ufeffprompt, winner ,right,left\r\n"Is it\r\ntrue?",Left,"no, ""never""",yes\r\n\r\nAnd this?,TIE,b,a\r\n'
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    found = report(path)
    assert (found["wins_left"], found["wins_right"], found["ties"]) == (1, 0, 1)
    assert found["mean_words_right"] == 1.5


HEAD = "left,right,winner\n"
REFUSED = {
    "an empty file": (b"", "is empty"),
    "blank lines": (b"\n\n", "is empty"),
    "no rows": (HEAD.encode(), "holds no judgements"),
    "a missing column": (
        b"left,right\na,b\n",
        "line 1 has no column winner; wanted left, right, winner, got left, right",
    ),
    "a column twice": (b"left,right,winner,winner\na,b,tie,left\n", "line 1 has the column winner twice"),
    "an unknown winner": (f"{HEAD}a,b,tie\na,b,both\n".encode(), "line 3: winner is 'both'; wanted left, right or tie"),
    "a winner behind a long cell": (f'{HEAD}"a\n\na",b,tie\na,b,\n'.encode(), "line 5: winner is ''"),
    "an unknown order": (b"left,right,winner,first_order\na,b,tie,A\n", "line 2: first_order is 'A'"),
    "a short row": (f"{HEAD}a,b,tie\na,b\n".encode(), "line 3 has 2 columns; line 1 has 3"),
    "a long row": (f"{HEAD}a,b,tie,x\n".encode(), "line 2 has 4 columns; line 1 has 3"),
    "another encoding": (HEAD.encode() + b"a,b,tie\ncaf\xe9,b,tie\n", "line 3 is not UTF-8 text"),
    "an open quote": (HEAD.encode() + b'a,b,tie\n"a,b,tie\n', "line 3 is no CSV"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tables_that_are_refused(case, tmp_path, capfd):
    content, text = REFUSED[case]
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert main(["report", "--judgements", str(path)]) == 1
    message = capfd.readouterr().err.strip()
    assert text in message
    assert "\n" not in message
    assert message.startswith("fpo-train report: error: judgements: ")
    assert not (tmp_path / "report.json").exists()


def test_a_missing_table_and_wrong_usage(tmp_path, capfd):
    assert main(["report", "--judgements", str(tmp_path / "nowhere.csv")]) == 1
    assert "nowhere.csv cannot be read: No such file" in capfd.readouterr().err
    assert main(["report"]) == 2
    assert "judgements" in capfd.readouterr().err
    assert main(["report", "--judgments", "t.csv"]) == 2


def test_the_report_goes_where_it_is_told(tmp_path, capsys):
    path = table(tmp_path / "t.csv", counted(1, 2, 3))
    assert main(["report", "--judgements", str(path), "--out", str(tmp_path / "new" / "folder")]) == 0
    assert json.loads((tmp_path / "new" / "folder" / "report.json").read_text())["ties"] == 3
    assert not (tmp_path / "report.json").exists()


def test_it_needs_no_torch(tmp_path):
    path = table(tmp_path / "t.csv", counted(1, 2, 3))
    code = f"""
import sys
from fpo_train.cli import main
code = main(["report", "--judgements", {str(path)!r}])
sys.exit(code or bool({{"torch", "triton", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
