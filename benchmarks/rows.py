"""What the benchmarks find out, one row a contender; the JSON file of them, and the frame that
tables are made of."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas
import torch
from pandas import DataFrame

import frozen_bn

from .cases import Case, Shape
from .timing import Rounds, quantiles

Quantiles = dict[str, float]

#: What the rows of one table line have in common.
LINE = ["benchmark", "operation", "dtype", "layout", "shape", "mode"]


@dataclass(frozen=True)
class Row:
    """One contender on one problem. Bytes and launches where they were counted."""

    benchmark: str  # op, overhead, model, memory, casts, roofline
    operation: str  # or the network
    dtype: str
    layout: str
    shape: Shape
    mode: str
    contender: str
    role: str  # ours, floor, peer, or beside
    seconds: Quantiles | None = None  # a call
    ratios: dict[str, Quantiles] = field(default_factory=dict)  # time of each of ours over this
    over_floor: Quantiles | None = None  # this one's time over the floor's
    saved_bytes: int | None = None  # for the backward pass; measured
    peak_bytes: int | None = None  # measured
    moved_bytes: float | None = None  # counted in an emulator, or added up from operators
    unavoidable_bytes: float | None = None
    launches: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


def timed(
    problem: Sequence[Any], mode: str, rounds: dict[str, Rounds], role: Callable[[str], str]
) -> list[Row]:
    """Of contenders that were timed in turns. ``problem``: the first five fields."""
    ours = [name for name in rounds if role(name) == "ours"]
    floor = next((of for name, of in rounds.items() if role(name) == "floor"), None)
    return [
        Row(
            *problem,
            mode=mode,
            contender=name,
            role=role(name),
            seconds=quantiles(of),
            ratios={own: quantiles(rounds[own] / of) for own in ours},
            over_floor=None if floor is None else quantiles(of / floor),
        )
        for name, of in rounds.items()
    ]


def problem_of(benchmark: str, case: Case) -> tuple[str, str, str, str, Shape]:
    return benchmark, case.operation, case.dtype, case.layout, case.shape


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    on_gpu = device == "cuda" and torch.cuda.is_available()
    return {
        "device": device,
        "machine": torch.cuda.get_device_name() if on_gpu else _cpu(),
        "threads": torch.get_num_threads(),
        "cpu_level": frozen_bn._C.cpu_level(),
        "torch": torch.__version__,
        "frozen_bn": frozen_bn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
    }


def save(rows: Iterable[Row], about: dict[str, Any], file: Path) -> None:
    """A JSON list of objects, one a line, each with what ``about`` says of all."""
    file.write_text("[\n" + ",\n".join(json.dumps(about | asdict(row)) for row in rows) + "\n]\n")


def load(file: Path) -> DataFrame:
    """What ``save`` wrote. Quantiles are columns: ``seconds.median``, ``ratios.frozen_bn.q80``.
    ``name`` and ``numel`` are added."""
    rows = pandas.json_normalize(json.loads(file.read_text()))
    if "seconds.median" not in rows:  # nothing was timed
        rows["seconds.median"] = math.nan
    rows["shape"] = rows["shape"].map(tuple)
    rows["numel"] = rows["shape"].map(math.prod)
    size = rows["shape"].map(lambda shape: "x".join(map(str, shape)))
    rows["name"] = rows["dtype"] + " " + rows["layout"] + " " + rows["operation"] + " " + size
    return rows


def fastest_peers(rows: DataFrame) -> DataFrame:
    """One a line."""
    peers = rows[rows["role"] == "peer"]
    return peers.loc[peers.groupby(LINE, sort=False)["seconds.median"].idxmin()]
