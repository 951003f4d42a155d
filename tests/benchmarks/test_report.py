"""figures.csv and report.md: what lies in the result files, no more and no less."""

import csv
import io
import json
import re
import statistics

import pytest

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.report import Device, page, sections, table
from benchmarks.report.drawing import short

DEVICES = [device for device in map(Device.read, sorted(results.FOLDER.iterdir())) if device.cases]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_what_is_committed_is_what_the_files_say(device):
    """Where this fails: `python -m benchmarks report`, and commit what it writes."""
    numbers, folder = device.folder / "figures.csv", device.folder / "report"
    assert numbers.read_text(encoding="utf-8") == table.text(device)
    said = (folder / "report.md").read_text(encoding="utf-8")
    assert said == page.text(device, folder, numbers)
    drawn = {path.name for path in folder.glob("*.svg")}
    assert drawn == set(re.findall(r"\]\(([\w-]+\.svg)\)", said))


def row(competitor, setting, took, **more):
    samples = [took, 2 * took, 4 * took]
    spread = {"median": samples[1], "min": samples[0], "max": samples[2]}
    ratio = {key: value / 10 for key, value in spread.items()}
    timed = {"status": "timed", "reason": "", "samples": samples, "in_rounds": True, "seconds": spread, "ratio": ratio}
    return {"setting": setting, "competitor": competitor, **timed, "peak_bytes": 3 * 2**20, "error": 1e-7, **more}


def result(case, rows, **more):
    machine = {"device_name": "a card", "cpu": "a chip", "threads": 7}
    versions = {"versions": {"python": "3", "torch": "2.11.0", "triton": None, "transformers": "5.0"}}
    at = {"commit": "c0ffee00", "finished": "2026-01-02T03:04:05+00:00"}
    return {"case": case, "description": f"about {case}", "baseline": "ours", **machine, **versions, **at, **more} | {
        "rows": rows
    }


@pytest.fixture
def folder(tmp_path):
    """A device with two cases: packages asks two questions, products has floors and a row of another day."""
    found = tmp_path / "a-device"
    found.mkdir()
    cannot = {"status": "cannot run", "reason": "not installed"}
    asked = [{"name": f"{q}, {n} of 64", "question": q} for q in ("norms", "gram") for n in (8, 32)]
    packages = [row("ours", setting, 5.0) for setting in asked] + [row("theirs", setting, 7.0) for setting in asked]
    packages += [{"setting": setting, "competitor": "others", **cannot} for setting in asked]
    one = {"name": "a | b"}
    floor = {"floor_seconds": 1.0, "of_floor": 0.1}
    products = [row("ours", one, 5.0, **floor), row("theirs", one, 7.0, commit="older", rss_bytes=9)]
    rates = {"copy_bytes_per_second": 12.3e9, "matmul_flops_per_second": {"float32": 103.4e9}}
    (found / "packages.json").write_text(json.dumps(result("packages", packages)))
    (found / "products.json").write_text(json.dumps(result("products", products, rates=rates)))
    (found / "products-quick.json").write_text(json.dumps(result("products", [])))
    (found / "environment.json").write_text('{"python": "3"}')
    return found


def test_a_row_of_the_csv(folder):
    rows = list(csv.DictReader(io.StringIO(table.text(Device.read(folder)))))
    assert len(rows) == 14
    assert tuple(rows[0]) == table.COLUMNS
    ours, theirs = rows[-2:]
    assert ours | {"setting": ""} == {
        "case": "products",
        "setting": "",
        "competitor": "ours",
        "status": "timed",
        "p20_seconds": "7",
        "p50_seconds": "10",
        "p80_seconds": "16",
        "samples": "3",
        "ratio": "1",
        "peak_bytes": "3145728",
        "process_bytes": "",
        "error": "1e-07",
        "of_floor": "0.1",
        "threads": "7",
        "device": "a card",
        "cpu": "a chip",
        "torch": "2.11.0",
        "triton": "",
        "transformers": "5.0",
        "commit": "c0ffee00",
        "finished": "2026-01-02T03:04:05+00:00",
    }
    assert (theirs["commit"], theirs["finished"], theirs["process_bytes"]) == ("older", "", "9")
    cannot = [row for row in rows if row["status"] == "cannot run"]
    assert len(cannot) == 4
    assert not any(cannot[0][key] for key in ("p50_seconds", "samples", "ratio", "peak_bytes", "error", "of_floor"))


def test_percentiles():
    samples = [3.0, 1.0, 2.0, 10.0, 4.0]
    assert table.percentile(samples, 50) == statistics.median(samples)
    assert [table.percentile(samples, p) for p in (0, 20, 80, 100)] == [1.0, 1.8, pytest.approx(5.2), 10.0]
    assert table.percentile([2.5], 80) == 2.5


def test_the_page_and_its_figures(folder, capsys):
    assert main(["report", "--device", str(folder)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "figures.csv"), str(folder / "report" / "report.md")]
    said = (folder / "report" / "report.md").read_text(encoding="utf-8")
    parts = {part.split("\n", 1)[0]: part for part in said.split("\n## ")[1:]}
    assert list(parts) == [title for title, _ in sections.SECTIONS]
    time, memory, floor = (parts[name] for name in ("Time beside peers", "Memory beside peers", "Of the floor"))
    assert "**packages, norms**" in time
    assert "| norms, 8 of 64 | 10 s (1.00) | 14 s (1.40) |" in time
    assert "others" not in time, "what never ran has no column"
    assert "| gram, 32 of 64 | 3 (1.00) | 3 (1.00) |" in memory
    assert "copies move 12.3 GB/s, matrix products run at 103 GFLOP/s in float32" in floor
    assert "| a \\| b | 0.10 |" in floor
    assert "Nothing yet" in parts["Scaling"]
    assert "- packages, others: cannot run in 4 settings: not installed" in parts["What is absent"]
    assert "Not measured on this device: ways," in parts["What is absent"]
    drawn = sorted(path.name for path in (folder / "report").glob("*.svg"))
    of_questions = [f"{what}-packages-{question}.svg" for what in ("memory", "time") for question in ("gram", "norms")]
    assert drawn == ["floor-products.svg", *of_questions]
    assert set(re.findall(r"\]\(([\w-]+\.svg)\)", said)) == set(drawn)


def test_figures_are_read_on_a_telephone_in_light_and_dark(folder, tmp_path):
    out = tmp_path / "out"
    assert main(["report", "--device", str(folder), "--out", str(out)]) == 0
    assert (out / "figures.csv").is_file()
    assert not (folder / "report").exists()
    for path in out.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert float(re.search(r'width="([\d.]+)pt"', text)[1]) / 0.75 < 405, "pixels, at its own size"
        assert min(float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", text)) >= 11
        assert "prefers-color-scheme:dark" in text
        assert "fill:var(--paper" in text
        assert not re.search(r"#222222(?!\)|;)", text), "ink that stays dark"
    assert "8 of 64" in (out / "time-packages-norms.svg").read_text(), "settings are named by what tells them apart"


def test_a_section_of_ones_own(folder, tmp_path, monkeypatch):
    rows = [row("ours", {"name": f"{n} texts"}, n) for n in (1.0, 2.0)]
    (folder / "scaling.json").write_text(json.dumps(result("scaling", rows)))
    mine = ("Mine", lambda device, draw: [f"of {device.name}", draw("mine", {}, "nothing")])
    monkeypatch.setattr(page, "SECTIONS", (*sections.SECTIONS, mine))
    assert main(["report", "--device", str(folder), "--out", str(tmp_path / "out")]) == 0
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| 2.0 texts | 4 s (0.40) |" in said.split("## Scaling")[1].split("##")[0]
    assert "\n## Mine\n\nof a-device\nNothing to draw.\n" in said


def test_nothing_to_report_of(tmp_path, capsys):
    for asked in (["--device", str(tmp_path)], ["--out", str(tmp_path)]):
        with pytest.raises(SystemExit) as stopped:
            main(["report", *asked])
        assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "no result files of cases" in said
    assert "wants one --device of " in said


def test_settings_are_told_apart():
    assert short(["norms, 6 layers, 8 of 64", "norms, 6 layers, 32 of 64"]) == ["8 of 64", "32 of 64"]
    assert short(["30 layers, 8+1 of 64 float32", "2 layers, 8+1 of 64 float32"]) == [
        "30 layers, 8+1 of 64",
        "2 layers, 8+1 of 64",
    ]
    assert short(["one"]) == ["one"]
    assert short(["a, b", "a"]) == ["a, b", "a"]
