"""The parts of benchmarks/gpu_check.py that need no GPU."""

from __future__ import annotations

import sys

import pytest
import torch

gpu_check = pytest.importorskip(
    "benchmarks.gpu_check", reason="needs pandas and timm, and the repository's root as cwd"
)
from benchmarks import cases, peers  # noqa: E402

CASE = cases.Case("fp16", "contiguous", "residual+relu", (2, 8, 4, 4))


def test_bandwidth():
    assert gpu_check.peak_bandwidth(2_619_000, 5120) == pytest.approx(3352e9, rel=1e-3)  # H100 SXM
    assert gpu_check.peak_bandwidth(0, 5120) is None


def test_launches():
    """Of the model; those seen are for a GPU."""
    seen = {CASE: {peers.OURS: 2, "torchvision": 12, "batch_norm": 7, "detectron2": 13}}
    _, table = gpu_check.launches_table(seen)
    assert [*table.index] == [CASE.name]
    assert [*table.loc[CASE.name]] == ["2 / 2", "12 / 11", "7 / 5", "13 / 13"]


def test_report():
    steps = [
        gpu_check.Step("build", "passed", 1.2, "sm_90"),
        gpu_check.Step("compute-sanitizer", "skipped", 0, "not installed"),
    ]
    report = gpu_check.render({"gpu": "H100"}, steps, {"Launches": "as many"})
    assert "- gpu: H100" in report and "## Launches\n\nas many" in report
    assert "| build | passed | 1 |" in report
    assert "not installed" in report


def test_commands_pass_and_fail():
    done = gpu_check.run("good", [sys.executable, "-c", "print('fine')"])
    assert (done.outcome, done.output) == ("passed", "fine")
    failed = gpu_check.run("bad", [sys.executable, "-c", "raise SystemExit(3)"])
    assert failed.outcome == "failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_claimed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert "finds no GPU" in capsys.readouterr().err
