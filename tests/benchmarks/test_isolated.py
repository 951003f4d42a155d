"""Memory of a competitor in a process of its own."""

import sys
from pathlib import Path

import pytest

from benchmarks import isolated
from tests.benchmarks.hungry import CASE, MEBIBYTES

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")


def test_what_a_competitor_allocates_shows():
    frugal = isolated.measure(CASE, "full", "frugal")
    hungry = isolated.measure(CASE, "full", "hungry")
    assert frugal["rss_reason"] == hungry["rss_reason"] == ""
    # Libraries differ by a few MiB from process to process.
    assert hungry["rss_bytes"] - frugal["rss_bytes"] == pytest.approx(MEBIBYTES * 2**20, rel=0.2)
    assert hungry["rss_bytes"] - hungry["rss_built_bytes"] == pytest.approx(MEBIBYTES * 2**20, rel=0.2)
    assert 50 * 2**20 < frugal["rss_bytes"] < 2 * 2**30


def test_quick_names_another_setting():
    assert isolated.measure(CASE, "quick", "frugal", quick=True)["rss_bytes"]


@pytest.mark.parametrize(
    ("setting", "competitor", "reason"),
    [
        ("full", "broken", "ValueError: no appetite"),
        ("full", "absent", "it is elsewhere"),
        ("unheard of", "frugal", "KeyError: 'unheard of'"),
    ],
)
def test_a_child_that_fails_gives_its_reason(setting, competitor, reason):
    found = isolated.measure(CASE, setting, competitor)
    assert found["rss_bytes"] is None
    assert found["rss_reason"] == f"own process: exit code 1: {reason}"


def test_without_proc_there_is_no_figure(monkeypatch):
    monkeypatch.setattr("benchmarks.meters.STATUS", Path("/nowhere"))
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert isolated.measure(CASE, "full", "frugal")["rss_reason"] == "no /proc/self/status here"


def test_a_child_that_cannot_start_gives_its_reason(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "/nowhere/python" in isolated.measure(CASE, "full", "frugal")["rss_reason"]
