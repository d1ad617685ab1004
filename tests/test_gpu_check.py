"""The parts of benchmarks/gpu_check.py that need no GPU."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

gpu_check = pytest.importorskip(
    "benchmarks.gpu_check", reason="needs rich and torchvision, and the repository's root as cwd"
)
from benchmarks import cases, peers, rows  # noqa: E402
from benchmarks.timing import Timing  # noqa: E402

CASE = cases.Case("fp16", "contiguous", "residual+relu", (2, 8, 4, 4))
TIMES = {peers.OURS: 2e-6, peers.FLOOR: 2e-6, "torchvision": 8e-6, "batch_norm": 6e-6}


def found(mode: str, needed: int | None = 2000) -> list[rows.Row]:
    timings = {name: Timing((time,) * 3) for name, time in TIMES.items()}
    made = rows.timed(rows.problem_of("op", CASE), mode, timings, peers.role)
    return [replace(row, unavoidable_bytes=needed) for row in made]


def test_rows_are_compared_with_the_model():
    table = gpu_check.over_model(found("forward"), 1e9)
    one = "1.00 (1.00-1.00)"
    assert table.cells[0] == (CASE.name, "forward", "2.0", "2.0", one, "3.00 (3.00-3.00)")
    assert table.cells[1] == ("geometric mean", "forward", "", "", one, "")


def test_rows_in_place_are_left_out():
    assert gpu_check.over_model(found("in place", None), 1e9).cells == []


def test_bandwidth():
    assert gpu_check.peak_bandwidth(2_619_000, 5120) == pytest.approx(3352e9, rel=1e-3)  # H100 SXM
    assert gpu_check.peak_bandwidth(0, 5120) is None


def test_launches():
    """Of the model; those seen are for a GPU."""
    seen = {CASE: {peers.OURS: 2, "torchvision": 12, "batch_norm": 7, "detectron2": 13}}
    (cells,) = gpu_check.launches_table(seen).cells
    assert cells == (CASE.name, "2 / 2", "12 / 11", "7 / 5", "13 / 13")


def test_report():
    steps = [
        gpu_check.Step("build", "passed", 1.2, "sm_90"),
        gpu_check.Step("compute-sanitizer", "skipped", 0, "not installed"),
    ]
    table = gpu_check.over_model(found("forward"), None)
    report = gpu_check.render({"gpu": "H100"}, steps, {"Measured": table.markdown()})
    assert "- gpu: H100" in report
    assert "| build | passed | 1 |" in report
    assert "not installed" in report
    assert f"| {CASE.name} | forward | 2.0 | - | - | 3.00 (3.00-3.00) |" in report


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
