"""The parts of benchmarks/gpu_check.py that need no GPU."""

from __future__ import annotations

import sys

import pytest
import torch

gpu_check = pytest.importorskip(
    "benchmarks.gpu_check", reason="needs rich and torchvision, and the repository's root as cwd"
)
bench_op = pytest.importorskip("benchmarks.bench_op")

CASE = bench_op.Case("fp16", "contiguous", "residual+relu", (2, 8, 4, 4))
NUMEL = 256


def rows(*names: str, mode: str = "forward") -> list[dict]:
    times = {"ours": 2e-6, "torchvision": 8e-6, "batch_norm": 6e-6, "scale-shift": 7e-6}
    seconds = {name: {"median": time} for name, time in times.items()}
    return [{"name": name, "mode": mode, "seconds": seconds} for name in names]


@pytest.mark.parametrize(
    ("mode", "tensors", "masks"), [("forward", 3, 1), ("forward+backward", 6, 2)]
)
def test_rows_are_compared_with_the_model(mode, tensors, masks):
    (row,) = gpu_check.measured_rows(rows(CASE.name, "another", mode=mode), [CASE], 1e9)
    assert row.modelled == pytest.approx((tensors * 2 * NUMEL + masks * NUMEL / 8) / 1e9)
    assert row.ratio == pytest.approx(2e-6 / row.modelled)
    assert row.fastest_peer == 6e-6


def test_rows_in_place_are_left_out():
    assert gpu_check.measured_rows(rows(CASE.name, mode="inplace"), [CASE], 1e9) == []


def test_bandwidth():
    assert gpu_check.peak_bandwidth(2_619_000, 5120) == pytest.approx(3352e9, rel=1e-3)  # H100 SXM
    assert gpu_check.peak_bandwidth(0, 5120) is None


def test_report():
    steps = [
        gpu_check.Step("build", "passed", 1.2, "sm_90"),
        gpu_check.Step("compute-sanitizer", "skipped", 0, "not installed"),
    ]
    measured = gpu_check.measured_rows(rows(CASE.name), [CASE], 1e9)
    report = gpu_check.render({"gpu": "H100"}, steps, measured)
    assert "- gpu: H100" in report
    assert "| build | passed | 1 |" in report
    assert "not installed" in report
    assert f"| {CASE.name} | forward | 2.0 | 1.6 | 1.28 | 3.00 |" in report
    assert "geometric mean 1.28" in report


def test_report_without_a_known_bandwidth():
    measured = gpu_check.measured_rows(rows(CASE.name), [CASE], None)
    assert f"| {CASE.name} | forward | 2.0 | - | - | 3.00 |" in gpu_check.render({}, [], measured)


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
