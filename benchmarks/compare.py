"""``python benchmarks/compare.py old.json new.json``: what became slower than it was.

Each file is one that ``python -m benchmarks`` saved. Lines (layer or network, mode, device,
threads) that both have are compared, in the ratio of our time to that of the fastest peer in the
same run, never in times. Worse is what is worse by more than ``--tolerance`` and beyond the
scatter: the new ratio's 20 % quantile lies above the old one's 80 % quantile. Exits with 1 if
anything is, with 2 if nothing can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
LINE = ("benchmark", "operation", "dtype", "layout", "shape", "mode", "device", "threads")
CONDITIONS = ("machine", "cpu_level", "torch", "python", "inplace_followers")
TOLERANCE = 0.1


@dataclass(frozen=True)
class Change:
    """The ratio of one of ours to the fastest peer, then and now."""

    name: str
    old: dict[str, float]
    new: dict[str, float]
    peers: tuple[str, str]

    def worse(self, tolerance: float) -> bool:
        beyond_scatter = self.new["q20"] > self.old["q80"]
        return beyond_scatter and self.new["median"] > self.old["median"] * (1 + tolerance)

    def __str__(self) -> str:
        (old, new), (before, after) = (map(_spread, (self.old, self.new)), self.peers)
        return f"{self.name}: {old} of {before} -> {new} of {after}"


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['q20']:.3f}-{ratio['q80']:.3f})"


def _lines(records: Iterable[Record]) -> dict[tuple[str, ...], dict[str, Record]]:
    """By what identifies a line, its contenders that were timed."""
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        if record["seconds"] is not None:
            key = tuple(str(record[name]) for name in LINE)
            found.setdefault(key, {})[record["contender"]] = record
    return found


def changes(old: Iterable[Record], new: Iterable[Record]) -> list[Change]:
    """Of every line and every contender of ours that both have, over peers that both have."""
    before, after = _lines(old), _lines(new)
    found = []
    for key in before.keys() & after.keys():
        then, now = before[key], after[key]
        both = [name for name in then if name in now]
        peers = [name for name in both if then[name]["role"] == now[name]["role"] == "peer"]
        if not peers:
            continue
        best = [min(peers, key=lambda name: of[name]["seconds"]["median"]) for of in (then, now)]
        for ours in (name for name in both if now[name]["role"] == "ours"):
            ratios = [of[peer]["ratios"][ours] for of, peer in zip((then, now), best, strict=True)]
            found.append(Change(f"{ours}, {' '.join(key)}", *ratios, (best[0], best[1])))
    return sorted(found, key=lambda change: change.old["median"] / change.new["median"])


def conditions(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """What else differs: ratios depend on it too."""
    pairs = [(name, old[0].get(name), new[0].get(name)) for name in CONDITIONS]
    return [f"{name}: {then} -> {now}" for name, then, now in pairs if then != now]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    options = parser.parse_args(arguments)
    old, new = (json.loads(file.read_text()) for file in (options.old, options.new))
    found = changes(old, new)
    if not found:
        print("nothing to compare: no line of the old file is in the new one", file=sys.stderr)
        return 2
    for difference in conditions(old, new):
        print(f"not alike: {difference}")
    worse = [change for change in found if change.worse(options.tolerance)]
    for change in worse:
        print(f"WORSE  {change}")
    left = len(_lines(old).keys() - _lines(new).keys())
    print(f"{len(worse)} of {len(found)} ratios worsened; {left} old lines have no new one")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
