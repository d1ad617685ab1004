"""What the benchmarks find out, one row a contender; the JSON file of them."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import frozen_bn

from .cases import Case, Shape
from .timing import Quantiles, Timing

#: What the rows of one table line have in common.
Key = tuple[str, str, str, str, Shape, str]


@dataclass(frozen=True)
class Row:
    """One contender on one problem. Bytes and launches where they were counted."""

    benchmark: str  # op, overhead, model, memory, roofline, launches
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
    environment: dict[str, Any] = field(default_factory=dict)  # flat in the file

    @property
    def key(self) -> Key:
        kind = (self.benchmark, self.operation, self.dtype, self.layout)
        return *kind, self.shape, self.mode

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.layout} {self.operation} {'x'.join(map(str, self.shape))}"

    @property
    def numel(self) -> int:
        return Case(self.dtype, self.layout, "plain", self.shape).numel

    @property
    def median(self) -> float:
        """Seconds a call."""
        assert self.seconds is not None
        return self.seconds.median


def timed(
    problem: Sequence[Any], mode: str, timings: dict[str, Timing], role: Callable[[str], str]
) -> list[Row]:
    """Of contenders that were timed in turns. ``problem``: the first five fields."""
    ours = [name for name in timings if role(name) == "ours"]
    floor = next((timing for name, timing in timings.items() if role(name) == "floor"), None)
    return [
        Row(
            *problem,
            mode=mode,
            contender=name,
            role=role(name),
            seconds=Quantiles.of(timing.rounds),
            ratios={own: timings[own].over(timing) for own in ours},
            over_floor=None if floor is None else timing.over(floor),
        )
        for name, timing in timings.items()
    ]


def problem_of(benchmark: str, case: Case) -> tuple[str, str, str, str, Shape]:
    return benchmark, case.operation, case.dtype, case.layout, case.shape


@dataclass(frozen=True)
class Line:
    """The rows of one table line: all contenders on one problem in one mode, by name."""

    key: Key
    rows: dict[str, Row]

    @property
    def first(self) -> Row:
        return next(iter(self.rows.values()))

    def of(self, role: str) -> list[Row]:
        return [row for row in self.rows.values() if row.role == role]

    @property
    def fastest_peer(self) -> Row:
        return min(self.of("peer"), key=lambda row: row.median)

    @property
    def floor(self) -> Row:
        (floor,) = self.of("floor")
        return floor


def lines(rows: Iterable[Row], benchmark: str, mode: str | None = None) -> list[Line]:
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row.benchmark == benchmark and mode in (None, row.mode):
            found.setdefault(row.key, {})[row.contender] = row
    return [Line(key, of) for key, of in found.items()]


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


def save(rows: Iterable[Row], file: Path) -> None:
    """A JSON list of flat objects, one a line."""

    def record(row: Row) -> str:
        content = asdict(row)
        return json.dumps(content.pop("environment") | content)

    file.write_text("[\n" + ",\n".join(map(record, rows)) + "\n]\n")


def load(file: Path) -> list[Row]:
    def quantiles(figures: dict[str, float] | None) -> Quantiles | None:
        return None if figures is None else Quantiles(**figures)

    rows = []
    for record in json.loads(file.read_text()):
        own = {f.name: record.pop(f.name) for f in fields(Row) if f.name != "environment"}
        own["shape"] = tuple(own["shape"])
        for name in ("seconds", "over_floor"):
            own[name] = quantiles(own[name])
        own["ratios"] = {name: Quantiles(**figures) for name, figures in own["ratios"].items()}
        rows.append(Row(**own, environment=record))
    return rows
