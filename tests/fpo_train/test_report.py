"""The report from files on disk: everything in one page, holes where numbers are missing, nothing unescaped."""

import json
import re
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml

from fpo_train.cli import main
from fpo_train.report import progress, records
from fpo_train.report.page import SHOWN, write_report
from fpo_train.report.panels import CAPTIONS
from fpo_train.report.progress import Progress, Steps, duration, stage

from .runs import arguments

NASTY = "<script>alert('x')</script> & \"this\""
PHASES = ("generate", "score", "update", "retrain")


def row_of(iteration, **more):
    row = {
        "iteration": iteration, "reward": 0.1 * iteration, "penalty": 0.0, "effective_reward": 0.1, "kl": 0.01,
        "chosen_reward": 0.2, "oracle_utility": -3.0, "proxy_gap": 0.3, "overconfidence": 0.1, "steering": None,
        "oracle_scale": "utility", "penalty_to_reward_std": 12.0, "reply_tokens": 9.0, "repetition": 0.2,
        "reward_model_drift": 0.01, "oracle_calls": 2, "oracle_failures": 1, "peak_memory_bytes": 3 * 2**30,
        "seconds": dict.fromkeys(PHASES, 0.5), "warning": None,
    }  # fmt: skip
    return row | more


def sample_of(iteration, name="p1", **more):
    sample = {"iteration": iteration, "id": name, "prompt": f"prompt {name}", "reply": f"reply {iteration}"}
    return sample | {"reference": f"reference {iteration}", "unpenalised_reply": None} | more


def write(out, rows, samples, kinds=(), device=NASTY, **config):
    out.mkdir(parents=True, exist_ok=True)
    config = {"compare": ",".join(kinds), "penalty": {"kind": "practical"}, **config}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    (out / "environment.json").write_text(json.dumps({"device": device}))
    for kind in kinds or [""]:
        (out / kind).mkdir(exist_ok=True)
        records.append(out / kind / "metrics.jsonl", rows)
        records.append(out / kind / "samples.jsonl", samples)
    return write_report(out).read_text(encoding="utf-8")


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr("fpo_train.report.panels.draw", lambda *arguments: [])


def images(page):
    """Names of the figures in the page, each of which is a whole SVG that holds on light and dark."""
    found = re.findall(r'<svg role="img" aria-label="(\w+)".*?</svg>', page, re.DOTALL)
    for one in re.finditer(r"<svg .*?</svg>", page, re.DOTALL):
        drawn = ElementTree.fromstring(one[0].replace("xlink:", ""))
        assert [text for text in drawn.iter("text") if text.text]
        assert "var(--ink,#222222)" in one[0]
        assert not re.search(r"#(fff|000)", one[0].replace("var(--ink,#000000)", ""))  # of a paper or an ink of its own
        assert set(re.findall(r"font-size: ([\d.]+px)", one[0])) == {"11px"}
    return found


def cells(page):
    """The text of every row's cells."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [
        [re.sub(r"<small>.*?</small>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows
    ]


def test_everything_is_in_one_page(tmp_path):
    rows = [
        row_of(i, steering=0.1 * i, audit_gain=0.1, scaled_penalty_to_reward_std=1.0, **warning)
        for i, warning in zip(range(1, 5), [{}, {}, {"warning": "possible <b>collapse</b>"}, {}], strict=True)
    ]
    samples = [sample_of(i, prompt=NASTY, unpenalised_reply=f"{NASTY} alone {i}") for i in range(1, 5)]
    page = write(tmp_path / "run", rows, samples, ("none", "exact"))  # whose line is black
    assert images(page) == list(CAPTIONS)
    assert not re.search(r"(src|href)=['\"](?!data:|#)", page)
    assert "http" not in page
    assert "<script>" not in page
    assert "<b>collapse" not in page
    assert page.count("&lt;b&gt;collapse") == 2  # once a penalty, in the list of warnings
    assert page.count("none, by reward alone") == page.count("exact, by reward alone") == 1
    assert ["oracle on all candidates: U − U_ref", "+0.100 → +0.100", "+0.100 → +0.100"] in cells(page)
    assert ["reward model on all candidates", "+0.100 → +0.400", "+0.100 → +0.400"] in cells(page)


def test_a_comparison_leads_to_each_run_s_own_page(tmp_path, no_figures):
    out = tmp_path / "run"
    assert "href" not in write(out, [row_of(1)], [], ("none", "practical")).replace("xlink:href", "")
    (out / "none" / "report.html").touch()
    page = write_report(out).read_text(encoding="utf-8")
    assert re.findall(r" href='([^']*)'", page) == ["none/report.html"]
    alone = write(tmp_path / "alone", [row_of(1)], [])
    assert " href=" not in write_report(tmp_path / "alone").read_text(encoding="utf-8")
    assert alone == write_report(tmp_path / "alone").read_text(encoding="utf-8")


def test_the_page_has_a_dark_scheme_and_nothing_wider_than_a_phone(tmp_path, no_figures):
    page = write(tmp_path / "run", [row_of(1)], [sample_of(1)])
    style = re.search(r"<style>(.*?)</style></head>", page, re.DOTALL)[1]
    assert "width=device-width" in page
    assert "color-scheme:light dark" in style
    light, dark = (set(re.findall(r"(--\w+):#", part)) for part in re.findall(r":root\{(.*?)\}", style))
    assert light == dark == {"--ink", "--paper", "--soft", "--line", "--card", "--link"}
    assert "@media (prefers-color-scheme:dark)" in style
    fixed = re.findall(
        r"(?<!max-)(?:width|min-width|minmax\(min\(100%),?:?(\d+)(?:px|rem)", style.replace("(max-width", "")
    )
    assert [wide for wide in fixed if int(wide) > 26] == []
    assert "minmax(min(100%,26rem),1fr)" in style
    assert "table,tbody,tr,td{display:block" in style
    named = re.findall(r"<td(?: class='text')? data-head='([^']*)'>", page)
    assert {"practical", "reply", "reward (base&#x27;s)", "penalty", "utility"} <= set(named)


def test_rows_of_older_runs_leave_holes(tmp_path):
    older = [{"iteration": i, "reward": 0.5, "seconds": {"score": 1.0}} for i in (1, 2)]
    page = write(tmp_path / "old", older, [{k: v for k, v in sample_of(2).items() if k != "unpenalised_reply"}])
    assert images(page) == ["reward", "seconds"]
    assert ["reward model on all candidates", "+0.500 → +0.500"] in cells(page)
    assert ["oracle on all candidates", "– → –"] in cells(page)
    assert "Nothing can be said: the oracle&#x27;s answers are missing." in page
    assert "Memory</h2>" not in page
    assert "None." in page
    empty = write(tmp_path / "empty", [], [])
    assert images(empty) == []
    assert "No iteration is done." in empty
    nulls = {"reward": None, "oracle_utility": None, "penalty_to_reward_std": None, "seconds": {}}
    assert images(write(tmp_path / "nulls", [row_of(1, **nulls)], [])) == [
        "proxy_gap", "overconfidence", "kl", "reward_model_drift", "reply_tokens", "repetition",
    ]  # fmt: skip


def test_planned_and_measured_memory(tmp_path, no_figures):
    sizes = [
        {"memory_planned": {"score": 4 * 2**30}, "memory_measured": {"score": i * 2**30, "update": 2**29}}
        for i in (1, 3, 2)
    ]
    rows = [row_of(i, **more) for i, more in enumerate(sizes, 1)]
    page = write(tmp_path / "cuda", rows, [])
    assert ["practical", "score", "4.00 GiB", "3.00 GiB", "0.75"] in cells(page)
    assert ["practical", "update", "–", "512.0 MiB", "–"] in cells(page)
    assert ["live tensors at most", "3.00 GiB"] in cells(page)
    assert "process's size" not in page
    page = write(tmp_path / "cpu", rows, [], device="cpu")
    assert "<th>planned: live tensors</th><th>process&#x27;s size</th></tr>" in page  # and no ratio of the two
    assert ["practical", "score", "4.00 GiB", "3.00 GiB"] in cells(page)
    assert ["process&#x27;s size at most", "3.00 GiB"] in cells(page)
    assert "what the tensors alone took is not measured on a CPU" in page


def test_what_the_oracle_was_asked_and_counted(tmp_path, no_figures):
    out = tmp_path / "run"
    for iteration, failed in ((9, 1), (10, 3)):
        folder = out / "none" / "checkpoints" / str(iteration)
        folder.mkdir(parents=True)
        (folder / "state.pt").touch()
        (folder / "oracle.json").write_text(json.dumps({"scored": 77, "http_429": failed}))
    records.append(out / "none" / "watched.jsonl", [sample_of(1, audit_calls=1, **NUMBERS)] * 3)
    page = write(out, [row_of(1, audit_calls=6), row_of(2, audit_calls=7)], [], ("none", "practical"))
    assert ["none", "4", "2", "16", "http_429 3, scored 77"] in cells(page)
    assert ["practical", "4", "2", "13", "–"] in cells(page)
    assert ["labels bought to learn from", "4", "4"] in cells(page)
    assert ["labels for this page alone", "16", "13"] in cells(page)
    assert "scored is single replies that it gave a utility to" in page
    for key in ("oracle_calls", "audit_calls"):
        assert f"· {key}</small>" in page


def test_a_penalty_s_weight_is_shown_before_and_after_scaling(tmp_path, no_figures):
    rows = [row_of(i, penalty_to_reward_std=i * 100.0, scaled_penalty_to_reward_std=0.9 + i / 10) for i in (1, 2, 3)]
    page = write(tmp_path / "run", rows, [])
    assert ["penalty ÷ reward spread, raw", "200"] in cells(page)
    assert ["penalty ÷ reward spread, scaled", "1.1"] in cells(page)


def test_a_large_run_s_page_stays_small(tmp_path, no_figures):
    samples = [sample_of(1, name=f"p{n}") for n in range(SHOWN + 3)]
    page = write(tmp_path / "run", [row_of(1)], samples)
    assert page.count("<h4>") == SHOWN
    assert f"{SHOWN} of {SHOWN + 3} prompts" in page


def test_penalties_are_matched_by_prompt_not_by_place(tmp_path, no_figures):
    out = tmp_path / "run"
    write(out, [row_of(1)], [sample_of(1, "a"), sample_of(1, "b")], ("none", "practical"))
    records.cut(out / "practical" / "samples.jsonl", 0)
    records.append(out / "practical" / "samples.jsonl", [sample_of(1, "b", reply="other"), sample_of(1, "c")])
    page = write_report(out).read_text(encoding="utf-8")
    shown = cells(page[page.index("<h4>prompt b") : page.index("<h4>prompt c")])
    assert [row[:2] for row in shown] == [["base model", "reference 1"], ["none", "reply 1"], ["practical", "other"]]
    assert "No question was put to the policy more than once" in page


NUMBERS = {"reward": 0.5, "penalty": -0.25, "utility": -2.0, "reference_reward": 0.125, "reference_utility": -3.0}


def test_the_same_question_over_time_with_its_numbers(tmp_path, no_figures):
    out = tmp_path / "run"
    write(out, [row_of(1)], [sample_of(4, "last")], ("none", "practical"))
    for kind, replies in (("none", {1: "one", 2: "two", 4: "four"}), ("practical", {1: "one", 2: "zwei", 4: "vier"})):
        rows = [
            sample_of(i, name, reply=reply, reference="base", **NUMBERS | {"reward": i})
            for i, reply in replies.items()
            for name in "ab"
        ]
        records.append(out / kind / "watched.jsonl", rows)
    page = write_report(out).read_text(encoding="utf-8")
    shown = cells(page[page.index("<h4>prompt a") : page.index("<h4>prompt b")])
    assert shown == [
        ["base model", "base", "–", "–", "-3.000"],
        ["none, after 1", "one", "+1.000 (+0.125)", "-0.250", "-2.000"],
        ["none, after 2", "two", "+2.000 (+0.125)", "-0.250", "-2.000"],
        ["none, after 4", "four", "+4.000 (+0.125)", "-0.250", "-2.000"],
        ["practical, after 1", "one", "+1.000 (+0.125)", "-0.250", "-2.000"],
        ["practical, after 2", "zwei", "+2.000 (+0.125)", "-0.250", "-2.000"],
        ["practical, after 4", "vier", "+4.000 (+0.125)", "-0.250", "-2.000"],
    ]
    assert "What was learnt last: iteration 4" in page


def test_questions_that_training_came_back_to_are_shown_over_time(tmp_path, no_figures):
    samples = [sample_of(1, "a"), sample_of(1, "b"), sample_of(3, "a", unpenalised_reply="u", unpenalised_reward=2.0)]
    page = write(tmp_path / "run", [row_of(1)], samples)
    assert "What was learnt of questions that came more than once." in page
    assert "<h4>prompt b" not in page
    over_time = cells(page[page.index("<h3>The same") : page.index("<h3>What was learnt last")])
    assert [row[:2] for row in over_time] == [
        ["base model", "reference 1"], ["practical, after 1", "reply 1"], ["practical, after 3", "reply 3"],
        ["practical, after 3, by reward alone", "u"],
    ]  # fmt: skip
    assert over_time[-1][2] == "+2.000"


TIME = r"^\d\d:\d\d:\d\d  "


@pytest.mark.parametrize("shown", [True, False])
def test_progress_shows_rows_and_warnings(capsys, shown):
    with Progress("relaxed", 20, 0, shown) as shows:
        shows(row_of(4, oracle_utility=None))
        shows(row_of(5, warning="possible collapse"))
    lines = capsys.readouterr().err.splitlines()
    if not shown:
        assert lines == []
        return
    assert all(re.match(TIME, line) for line in lines)
    assert [re.sub(TIME, "", line) for line in lines] == [
        "relaxed    4/20  reward +0.400, oracle –, gap +0.300, kl 0.0100, 2.0 s, 32 s left",
        "relaxed    5/20  reward +0.500, oracle -3.000, gap +0.300, kl 0.0100, 2.0 s, 30 s left",
        "relaxed    5/20  warning: possible collapse",
    ]


def test_a_log_names_the_phase_of_an_iteration_that_lasts(capsys, monkeypatch):
    with Progress("relaxed", 20, 3) as shows:
        shows.phase("generate")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "SILENT", 0.4)
        shows.phase("score")
        time.sleep(1.0)
        shows(row_of(4))
        shows.phase("update")
        shows.phase("retrain")
        time.sleep(0.7)
    lines = [re.sub(TIME, "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == lines[1] == "relaxed    4/20  score …"  # and again, as it goes on
    assert [line for line in lines if "…" in line and " 5/20" in line] == ["relaxed    5/20  retrain …"]


@pytest.mark.parametrize("live", [True, False])
def test_what_takes_long_before_the_first_iteration_is_named(capsys, monkeypatch, live):
    monkeypatch.setattr("sys.stderr.isatty", lambda: live)
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with stage("loading"):
        assert capsys.readouterr().err == ("loading …" if live else "")
        time.sleep(0.5)
        assert re.fullmatch("" if live else TIME + "loading …\n", capsys.readouterr().err)
    assert capsys.readouterr().err == ("\r\x1b[K" if live else "")
    with stage("loading", shown=False):
        time.sleep(0.2)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    with stage("loading"):
        pass  # what is soon done is not worth a line
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list, that progress is told."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))
    return now


def counted(clock, took, total=12, each=3, **more):
    with Steps("first fit", total, "pairs", **more) as steps:
        for _ in range(0, total, each):
            clock[0] += took
            steps(each)


def test_slow_steps_are_a_line_each_and_quick_ones_a_line_now_and_then(capsys, clock):
    counted(clock, 2.0)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(TIME, "", line) for line in lines] == [
        "first fit: 3 of 12 pairs, 6 s left",
        "first fit: 6 of 12 pairs, 4 s left",
        "first fit: 9 of 12 pairs, 2 s left",
        "first fit: 12 of 12 pairs",
    ]
    assert all(re.match(TIME, line) for line in lines)
    counted(clock, 0.25, total=100, each=1)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(TIME, "", line) for line in lines] == [
        f"first fit: {n} of 100 pairs, {25 - n // 4} s left" if n < 100 else "first fit: 100 of 100 pairs"
        for n in (20, 40, 60, 80, 100)
    ]
    counted(clock, 0.25)  # what is soon done is not worth a line
    counted(clock, 2.0, shown=False)
    assert capsys.readouterr().err == ""


def test_a_first_step_that_lasts_is_told_of_meanwhile(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with Steps("loading", 3, "steps", even=False) as step:
        time.sleep(0.5)
        assert re.sub(TIME, "", capsys.readouterr().err) == "loading: 0 of 3 steps\n"
        monkeypatch.setattr(progress, "SLOW", 0.0)
        step(1, "read")
        assert re.sub(TIME, "", capsys.readouterr().err) == "loading: 1 of 3 steps (read)\n"
    with Steps("loading", 3, "steps", shown=False):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_of_notes_alone_and_of_work_that_is_gone_on_with(capsys, clock, monkeypatch):
    monkeypatch.setattr(progress, "WHO", "none: ")
    with Steps("study", 40, "iterations", done=20, each=False) as steps:
        clock[0] += 600
        steps(10)
        assert capsys.readouterr().err == ""
        steps.note("none, seed 1: done")
    line = capsys.readouterr().err
    assert re.sub(TIME, "", line) == "none: study: 30 of 40 iterations, 0:10:00 left (none, seed 1: done)\n"
    assert [duration(seconds) for seconds in (0.4, 99.4, 100, 3661)] == ["0 s", "99 s", "0:01:40", "1:01:01"]


def test_on_a_terminal_it_is_a_bar(capsys, clock, monkeypatch):
    drawn = []

    class Bar:
        def __init__(self, **options):
            drawn.append((options["desc"], options["initial"], options["total"]))

        def update(self, steps):
            drawn.append(steps)

        def close(self):
            drawn.append("closed")

    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    counted(clock, 2.0, total=6)
    assert drawn == [("first fit", 0, 6), 3, 3, "closed"]
    assert capsys.readouterr().err == ""


def test_a_run_says_how_far_its_start_is_and_nothing_of_it_on_stdout(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress, "SLOW", 0.0)  # each step is worth a line
    assert main(arguments(tiny, tmp_path / "run", "--iterations", 1)) == 0
    said = capfd.readouterr()
    lines = [re.sub(TIME, "", line) for line in said.err.splitlines() if re.match(TIME, line)]
    steps = ("read", "rows compared", "cache compared", "fingerprint taken")
    assert lines[:4] == [
        f"loading policy.model {tiny}: {n} of 4 steps ({step})" for n, step in enumerate(steps, start=1)
    ]
    told = (
        "reward model: its score head is ",
        "reward model: it reads ",
        "the oracle, which stands for the truth, is ",
    )
    assert all(line.startswith(one) for line, one in zip(lines[4:7], told, strict=True))
    assert [re.sub(r", \d+ s left", "", line) for line in lines[7:10]] == [
        f"first fit: {n} of 6 pairs" for n in (2, 4, 6)
    ]
    assert lines[10].startswith("practical    1/1  reward ")
    assert said.out == f"report: {tmp_path / 'run' / 'report.html'}\n"
    assert not set("\r\x1b") & set(said.err)
