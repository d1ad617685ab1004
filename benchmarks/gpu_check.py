"""``python -m benchmarks.gpu_check``: everything that needs a GPU, in one go, and one report file.

Every test on ``cuda``; streams, graphs and devices (tests/test_cuda.py); compute-sanitizer where it
is installed; ``benchmarks.bench_op`` with CUDA events, its times over the modelled ones.
Exits with 0 if all passed, 1 if something failed, 2 where there is no GPU or no CUDA half.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from frozen_bn import ops

from . import bench_op, op_report, peers, traffic
from .traffic import Pass

ROOT = Path(__file__).parents[1]
TAIL_LINES = 40
#: memcheck: out of bounds, misaligned; racecheck, synccheck: shared memory and barriers.
SANITIZERS = ("memcheck", "racecheck", "synccheck")
#: Each runs its kernels tens of times more slowly: only the test that goes through all of them.
SANITIZED = ("tests/test_cuda.py", "-k", "every_kernel")
MODES: dict[str, tuple[Pass, ...]] = {
    "forward": ("forward",),
    "forward+backward": ("forward", "backward"),
}


@dataclass(frozen=True)
class Step:
    """One command: what came of it."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    seconds: float
    output: str  # the end of it, or the reason


@dataclass(frozen=True)
class Measured:
    """One row of the benchmark; times in seconds."""

    name: str
    mode: str
    measured: float
    modelled: float | None
    fastest_peer: float

    @property
    def ratio(self) -> float | None:
        return self.measured / self.modelled if self.modelled else None


def run(name: str, command: Sequence[str], extra: Mapping[str, str] | None = None) -> Step:
    """Runs a command in the repository's root; its output goes to the report only."""
    print(f"{name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(extra or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    seconds = time.perf_counter() - start
    tail = "\n".join(done.stdout.splitlines()[-TAIL_LINES:])
    step = Step(name, "passed" if done.returncode == 0 else "failed", seconds, tail)
    print(f"{name}: {step.outcome} after {seconds:.0f} s", flush=True)
    return step


def run_tests() -> list[Step]:
    pytest = [sys.executable, "-m", "pytest", "-rs"]
    return [
        run("build", [sys.executable, "-m", "frozen_bn"]),
        run("all tests on cuda", [*pytest, "-k", "cuda", "--ignore=tests/test_cuda.py"]),
        run("streams, graphs, devices, repeatability", [*pytest, "-v", "tests/test_cuda.py"]),
    ]


def run_sanitizers() -> list[Step]:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if tool is None:
        return [Step("compute-sanitizer", "skipped", 0, "compute-sanitizer is not installed")]
    pytest = [sys.executable, "-m", "pytest", *SANITIZED]
    options = ["--error-exitcode", "1", "--report-api-errors", "no"]
    # Without torch's cache every tensor is an allocation of its own, whose ends are checked.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        run(f"compute-sanitizer {kind}", [tool, "--tool", kind, *options, *pytest], uncached)
        for kind in SANITIZERS
    ]


def peak_bandwidth(memory_clock_khz: int, bus_bits: int) -> float | None:
    """Bytes a second; two transfers a clock. ``None`` where the driver does not tell."""
    return memory_clock_khz * 1e3 * 2 * bus_bits / 8 or None


def measured_rows(
    rows: Sequence[Mapping[str, Any]], cases: Sequence[bench_op.Case], bandwidth: float | None
) -> list[Measured]:
    """Of the JSON that ``bench_op`` saves. Modelled: the unavoidable bytes at peak bandwidth."""
    by_name = {case.name: case for case in cases}
    result = []
    for row in rows:
        case = by_name.get(row["name"])
        if case is None or row["mode"] not in MODES:
            continue
        medians = {name: timing["median"] for name, timing in row["seconds"].items()}
        needed = sum(
            traffic.unavoidable_bytes(case, which, case.shape) for which in MODES[row["mode"]]
        )
        result.append(
            Measured(
                case.name,
                row["mode"],
                medians[peers.OURS],
                needed / bandwidth if bandwidth else None,
                min(medians[name] for name in peers.PEERS),
            )
        )
    return result


def run_benchmark(quick: bool) -> tuple[Step, list[Measured]]:
    properties = torch.cuda.get_device_properties(0)
    bandwidth = peak_bandwidth(properties.memory_clock_rate, properties.memory_bus_width)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "benchmarks.bench_op", "--device", "cuda"]
        command += ["--json", str(file), *(["--quick"] if quick else [])]
        step = run("benchmark", command)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return step, measured_rows(rows, bench_op.cases(bench_op.SHAPES, ()), bandwidth)


def _benchmark_section(rows: Sequence[Measured]) -> list[str]:
    lines = [
        "## Measured and modelled",
        "",
        "Medians of CUDA events, microseconds. Modelled: the unavoidable bytes at the peak "
        "bandwidth. Small layers stay in the L2 cache, where they can be faster than that, or are "
        "bound by their launches, where they are slower.",
        "",
        "| layer | mode | measured | modelled | measured/modelled | fastest peer/ours |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        modelled = "-" if row.modelled is None else f"{row.modelled * 1e6:.1f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(
            f"| {row.name} | {row.mode} | {row.measured * 1e6:.1f} | {modelled} | {ratio} "
            f"| {row.fastest_peer / row.measured:.2f} |"
        )
    for mode in MODES:
        ratios = [row.ratio for row in rows if row.mode == mode and row.ratio is not None]
        if ratios:
            mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
            lines.append(f"\n{mode}: measured/modelled, geometric mean {mean:.2f}")
    return lines


def render(
    environment: Mapping[str, object], steps: Sequence[Step], rows: Sequence[Measured]
) -> str:
    """The report, as Markdown."""
    lines = ["# frozen_bn on a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items()]
    lines += ["", "| step | outcome | seconds |", "|---|---|---:|"]
    lines += [f"| {step.name} | {step.outcome} | {step.seconds:.0f} |" for step in steps]
    if rows:
        lines += ["", *_benchmark_section(rows)]
    for step in steps:
        # A fence longer than any in the output.
        lines += ["", f"## {step.name}: {step.outcome}", "", "``````text", step.output, "``````"]
    return "\n".join(lines) + "\n"


def environment() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    return {
        **op_report.environment(),
        "capability": f"{properties.major}.{properties.minor}",
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def why_not() -> str | None:
    """Why nothing can be checked here."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    if "cuda" not in ops.live:
        return f"frozen_bn has no CUDA kernels: {ops.unavailable['cuda']}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("gpu-report.md"), metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="benchmark two small shapes only")
    options = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"gpu_check: nothing was checked: {reason}", file=sys.stderr)
        return 2
    steps = [*run_tests(), *run_sanitizers()]
    benchmark, rows = run_benchmark(options.quick)
    steps.append(benchmark)
    options.report.write_text(render(environment(), steps, rows))
    print(f"report: {options.report}")
    return 1 if any(step.outcome == "failed" for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
