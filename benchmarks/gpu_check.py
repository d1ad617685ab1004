"""``python -m benchmarks.gpu_check``: everything that needs a GPU, in one go, and one report file.

Every test on ``cuda``; streams, graphs and devices (tests/test_cuda.py); compute-sanitizer where it
is installed; ``python -m benchmarks all --device cuda``, whose tables are in the report; launches
that the profiler saw beside those that were counted.
Exits with 0 if all passed, 1 if something failed, 2 where there is no GPU or no CUDA half.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pandas import DataFrame
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from frozen_bn import ops

from . import dispatched, peers, rows, traffic
from .cases import QUICK_SHAPES, Case, Contender, Setup, every_case
from .tables import Table, markdown

ROOT = Path(__file__).parents[1]
TAIL_LINES = 40
#: memcheck: out of bounds, misaligned; racecheck, synccheck: shared memory and barriers.
SANITIZERS = ("memcheck", "racecheck", "synccheck")
#: Each runs its kernels tens of times more slowly: only the test that goes through all of them.
SANITIZED = ("tests/test_cuda.py", "-k", "every_kernel")
#: Of ours, forward and backward, with a frozen affine: tests/test_roofline.py.
OUR_LAUNCHES = (1, 1)


@dataclass(frozen=True)
class Step:
    """One command: what came of it."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    seconds: float
    output: str  # the end of it, or the reason


def run(name: str, command: Sequence[str], extra: Mapping[str, str] | None = None) -> Step:
    """Runs a command in the repository's root; its output goes to the report only."""
    print(f"{name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, **(extra or {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, errors="replace", **pipes)
    seconds = time.perf_counter() - start
    tail = "\n".join(done.stdout.splitlines()[-TAIL_LINES:])
    step = Step(name, "passed" if done.returncode == 0 else "failed", seconds, tail)
    print(f"{name}: {step.outcome} after {seconds:.0f} s", flush=True)
    return step


def run_all(quick: bool, saved: Path) -> Iterator[Step]:
    """``saved``: the rows of the benchmarks."""
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-rs"]
    # Each of the processes takes half a gigabyte of the GPU's memory.
    at_once = ["-n", str(min(8, os.cpu_count() or 1))]
    yield run("build", [*python, "frozen_bn"])
    on_cuda = ["-k", "cuda", "--ignore=tests/test_cuda.py"]
    yield run("all tests on cuda", [*pytest, *at_once, *on_cuda])
    yield run("streams, graphs, devices, repeatability", [*pytest, "-v", "tests/test_cuda.py"])
    sanitizer = "compute-sanitizer"
    tool = shutil.which(sanitizer) or shutil.which(f"/usr/local/cuda/bin/{sanitizer}")
    if tool is None:
        yield Step(sanitizer, "skipped", 0, "it is not installed")
    # Without torch's cache every tensor is an allocation of its own, whose ends are checked.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in SANITIZERS if tool else ():
        options = ["--tool", kind, "--error-exitcode", "1", "--report-api-errors", "no"]
        yield run(f"{sanitizer} {kind}", [tool, *options, *pytest, *SANITIZED], uncached)
    benchmark = [*python, "benchmarks", "all", "--device", "cuda", "--json", str(saved)]
    yield run("benchmark", benchmark + ["--quick"] * quick)


def peak_bandwidth(memory_clock_khz: int, bus_bits: int) -> float | None:
    """Bytes a second; two transfers a clock. ``None`` where the driver does not tell."""
    return memory_clock_khz * 1e3 * 2 * bus_bits / 8 or None


def seen_launches(setup: Setup, contender: Contender) -> int:
    """Kernels and copies, forward and backward, that the profiler sees on the GPU."""
    setup.full(contender)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        setup.full(contender)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def launches_table(seen: Mapping[Case, Mapping[str, int]]) -> Table:
    """Beside what ours should launch, and what torch dispatches for the peers."""
    lines = {}
    for case, of in seen.items():
        modelled = {peers.OURS: sum(OUR_LAUNCHES)}
        for name, passes in dispatched.dispatch_peers(case).items():
            modelled[name] = sum(one.launches for one in passes.values())
        lines[case.name] = {name: f"{of[name]} / {modelled[name]}" for name in modelled}
    title = "launches, forward + backward: measured by the profiler / modelled"
    return title, DataFrame.from_dict(lines, "index").rename_axis("layer")


def see_launches() -> dict[Case, dict[str, int]]:
    found: dict[Case, dict[str, int]] = {}
    for case in (c for c in every_case(QUICK_SHAPES) if c.dtype == "fp16"):
        setup = Setup(case, torch.device("cuda"))
        contenders = peers.contenders(setup.problem)
        names = (peers.OURS, *traffic.COUNTED)
        found[case] = {name: seen_launches(setup, contenders[name]) for name in names}
    return found


def render(
    environment: Mapping[str, object], steps: Sequence[Step], sections: Mapping[str, str]
) -> str:
    """The report, as Markdown."""
    lines = ["# frozen_bn on a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items()]
    lines += ["", "| step | outcome | seconds |", "|---|---|---:|"]
    lines += [f"| {step.name} | {step.outcome} | {step.seconds:.0f} |" for step in steps]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", text]
    for step in steps:
        # A fence longer than any in the output.
        lines += ["", f"## {step.name}: {step.outcome}", "", "``````text", step.output, "``````"]
    return "\n".join(lines) + "\n"


def environment() -> dict[str, object]:
    gpu = torch.cuda.get_device_properties(0)
    bandwidth = peak_bandwidth(gpu.memory_clock_rate, gpu.memory_bus_width)
    return {
        **rows.environment("cuda"),
        "capability": f"{gpu.major}.{gpu.minor}",
        "gpus": torch.cuda.device_count(),
        "peak memory bandwidth, GB/s": bandwidth and round(bandwidth / 1e9),
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
    parser.add_argument("--quick", action="store_true", help="python -m benchmarks all --quick")
    options = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"gpu_check: nothing was checked: {reason}", file=sys.stderr)
        return 2
    steps: list[Step] = []
    sections: dict[str, str] = {}

    def report() -> None:
        options.report.write_text(render(environment(), steps, sections))

    folder = options.report.resolve().parent / "gpu-report"
    folder.mkdir(exist_ok=True)
    for step in run_all(options.quick, folder / "all.json"):
        steps.append(step)
        report()
    if steps[-1].outcome == "passed":
        sections["Benchmarks"] = (folder / "all.md").read_text()
        report()
    sections["Launches"] = markdown(launches_table(see_launches()))
    report()
    print(f"report: {options.report}")
    return 1 if any(step.outcome == "failed" for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
