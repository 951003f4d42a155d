"""`fpo-train doctor --kernels`: every kernel against its reference, as a table; 1 where one is wrong."""

from __future__ import annotations

import pytest

from fpo_kernels import verification
from fpo_kernels.products import blocked
from fpo_train.cli import main


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "DIMS", (64, 2048))


def test_all_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--kernels"]) == 0
    out = capsys.readouterr().out
    for name in ("grad_products", "grad_direction", "grad_sketch", "torch, form", "k=2048", "bfloat16", "float64"):
        assert name in out
    assert "needs a GPU" in out
    assert " 0 wrong" in out.splitlines()[-1]


def test_a_wrong_one_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = blocked.grad_products

    def wrong(*given):
        return right(*given) * (1 + 1e-3)

    monkeypatch.setattr(blocked, "grad_products", wrong)
    assert main(["doctor", "--kernels"]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert bad
    assert all(line.startswith("grad_products  torch, tokens") for line in bad)


def test_one_that_does_not_run_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(blocked, "grad_products", broken)
    assert main(["doctor", "--kernels"]) == 1
    assert "WRONG: it does not run (RuntimeError: no such instruction)" in capsys.readouterr().out
