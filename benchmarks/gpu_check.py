"""``python -m benchmarks.gpu_check``: everything that needs a GPU, in one go, and one report file.

Every test on ``cuda``; streams, graphs and devices (tests/test_cuda.py); compute-sanitizer where it
is installed; ``python -m benchmarks all --device cuda``, whose tables are in the report; its times
over the modelled ones, and launches that the profiler saw beside those that were counted.
Exits with 0 if all passed, 1 if something failed, 2 where there is no GPU or no CUDA half.
"""

from __future__ import annotations

import argparse
import itertools
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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from frozen_bn import ops

from . import dispatched, peers, rows, traffic
from .cases import QUICK_SHAPES, Case, Contender, Setup, every_case
from .rows import Row
from .tables import Table, geometric_mean, spread
from .timing import Quantiles

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


def run_tests() -> Iterator[Step]:
    pytest = [sys.executable, "-m", "pytest", "-rs"]
    # Each of the processes takes half a gigabyte of the GPU's memory.
    at_once = ["-n", str(min(8, os.cpu_count() or 1))]
    yield run("build", [sys.executable, "-m", "frozen_bn"])
    on_cuda = ["-k", "cuda", "--ignore=tests/test_cuda.py"]
    yield run("all tests on cuda", [*pytest, *at_once, *on_cuda])
    yield run("streams, graphs, devices, repeatability", [*pytest, "-v", "tests/test_cuda.py"])


def run_sanitizers() -> Iterator[Step]:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if tool is None:
        yield Step("compute-sanitizer", "skipped", 0, "compute-sanitizer is not installed")
        return
    pytest = [sys.executable, "-m", "pytest", *SANITIZED]
    options = ["--error-exitcode", "1", "--report-api-errors", "no"]
    # Without torch's cache every tensor is an allocation of its own, whose ends are checked.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in SANITIZERS:
        command = [tool, "--tool", kind, *options, *pytest]
        yield run(f"compute-sanitizer {kind}", command, uncached)


def peak_bandwidth(memory_clock_khz: int, bus_bits: int) -> float | None:
    """Bytes a second; two transfers a clock. ``None`` where the driver does not tell."""
    return memory_clock_khz * 1e3 * 2 * bus_bits / 8 or None


def over_model(found: Sequence[Row], bandwidth: float | None) -> Table:
    """Ours, of the rows of ``benchmarks op``. Modelled: unavoidable bytes at peak bandwidth."""
    title = (
        "frozen_bn: measured medians of CUDA events, and modelled: the unavoidable bytes at the "
        "peak bandwidth. Small layers stay in the L2 cache, where they can be faster than that, or "
        "are bound by their launches, where they are slower"
    )
    headings = ("layer", "mode", "measured us", "modelled us", "measured/modelled")
    table = Table(title, (*headings, "fastest peer/frozen_bn"))
    ratios: dict[str, list[Quantiles]] = {}
    for line in rows.lines(found, "op"):
        ours = line.rows[peers.OURS]
        if ours.unavoidable_bytes is None or ours.seconds is None:
            continue  # in place
        modelled, ratio = "-", "-"
        if bandwidth:
            least = ours.unavoidable_bytes / bandwidth
            over = Quantiles(*(figure / least for figure in vars(ours.seconds).values()))
            ratios.setdefault(ours.mode, []).append(over)
            modelled, ratio = f"{least * 1e6:.1f}", spread(over)
        faster = spread(line.fastest_peer.ratios[peers.OURS].inverse())
        measured = f"{ours.median * 1e6:.1f}"
        table.cells.append((ours.name, ours.mode, measured, modelled, ratio, faster))
    for mode, of_mode in ratios.items():
        mean = spread(geometric_mean(of_mode))
        table.cells.append(("geometric mean", mode, "", "", mean, ""))
    return table


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
    names = (peers.OURS, *traffic.COUNTED)
    title = "launches, forward + backward: measured by the profiler / modelled"
    table = Table(title, ("layer", *names))
    for case, of in seen.items():
        modelled = {peers.OURS: sum(OUR_LAUNCHES)}
        for name, passes in dispatched.dispatch_peers(case).items():
            modelled[name] = sum(one.launches for one in passes.values())
        table.cells.append((case.name, *(f"{of[name]} / {modelled[name]}" for name in names)))
    return table


def see_launches() -> dict[Case, dict[str, int]]:
    found: dict[Case, dict[str, int]] = {}
    for case in (c for c in every_case(QUICK_SHAPES) if c.dtype == "fp16"):
        setup = Setup(case, torch.device("cuda"))
        contenders = peers.contenders(setup.problem)
        names = (peers.OURS, *traffic.COUNTED)
        found[case] = {name: seen_launches(setup, contenders[name]) for name in names}
    return found


def run_benchmark(quick: bool, file: Path) -> tuple[Step, list[Row], str]:
    """Its rows, and its tables in Markdown."""
    command = [sys.executable, "-m", "benchmarks", "all", "--device", "cuda", "--json", str(file)]
    step = run("benchmark", command + ["--quick"] * quick)
    if not file.exists():
        return step, [], ""
    return step, rows.load(file), file.with_suffix(".md").read_text()


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
    properties = torch.cuda.get_device_properties(0)
    return {
        **rows.environment("cuda"),
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
    parser.add_argument("--quick", action="store_true", help="python -m benchmarks all --quick")
    options = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"gpu_check: nothing was checked: {reason}", file=sys.stderr)
        return 2
    steps: list[Step] = []
    sections: dict[str, str] = {}

    def report() -> None:
        options.report.write_text(render(environment(), steps, sections))

    for step in itertools.chain(run_tests(), run_sanitizers()):
        steps.append(step)
        report()
    folder = options.report.resolve().parent / "gpu-report"
    folder.mkdir(exist_ok=True)
    benchmark, found, tables = run_benchmark(options.quick, folder / "all.json")
    steps.append(benchmark)
    properties = torch.cuda.get_device_properties(0)
    bandwidth = peak_bandwidth(properties.memory_clock_rate, properties.memory_bus_width)
    sections["Measured and modelled"] = over_model(found, bandwidth).markdown()
    sections["Benchmarks"] = tables
    report()
    sections["Launches"] = launches_table(see_launches()).markdown()
    report()
    print(f"report: {options.report}")
    return 1 if any(step.outcome == "failed" for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
