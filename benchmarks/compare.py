"""``python -m benchmarks.compare old.json new.json``: what became slower than it was.

Each file is one that ``python -m benchmarks`` saved. Lines (layer or network, mode, device,
threads) that both have are compared, in the ratio of our time to that of the fastest peer in the
same run, never in times. Worse is what is worse by more than ``--tolerance`` and beyond the
scatter: the new ratio's 20 % quantile lies above the old one's 80 % quantile. Exits with 1 if
anything is, with 2 if nothing can be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pandas import DataFrame, concat

from . import rows
from .tables import spread
from .timing import QUANTILES

LINE = [*rows.LINE, "device", "threads"]
CONDITIONS = ("machine", "cpu_level", "torch", "python", "inplace_followers")
TOLERANCE = 0.1


def ratios(timed: DataFrame) -> DataFrame:
    """Of every contender of ours, on every line, to the fastest peer there."""
    best = rows.fastest_peers(timed).set_index(LINE)
    found = []
    for name in timed.loc[timed["role"] == "ours", "contender"].unique():
        columns = {f"ratios.{name}.{part}": part for part in QUANTILES}
        of_name = best[["contender", *columns]].rename(columns=columns).dropna()
        found.append(of_name.assign(ours=name).set_index("ours", append=True))
    return concat(found)


def changes(old: DataFrame, new: DataFrame) -> DataFrame:
    """Of what both have, over peers that both have; what became worst first."""
    one = [*LINE, "contender", "role"]
    both = old[one].merge(new[one])
    then, now = (ratios(of.merge(both)) for of in (old, new))
    found = then.add_prefix("then.").join(now.add_prefix("now."), how="inner")
    factor = found["now.median"] / found["then.median"]
    return found.assign(factor=factor).sort_values("factor", ascending=False)


def worse(found: DataFrame, tolerance: float) -> DataFrame:
    beyond_scatter = found["now.q20"] > found["then.q80"]
    return found[beyond_scatter & (found["factor"] > 1 + tolerance)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    options = parser.parse_args(arguments)
    old, new = (rows.load(file) for file in (options.old, options.new))
    old, new = (of[of["seconds.median"].notna()] for of in (old, new))
    lines = old[LINE].drop_duplicates()
    left = len(lines) - len(lines.merge(new[LINE].drop_duplicates()))
    if left == len(lines):
        print("nothing to compare: no line of the old file is in the new one", file=sys.stderr)
        return 2
    for name in CONDITIONS:
        before, after = (of[name].iloc[0] for of in (old, new))
        if before != after:
            print(f"not alike: {name}: {before} -> {after}")
    found = changes(old, new)
    slower = worse(found, options.tolerance)
    then, now = (spread(slower, w) + " of " + slower[f"{w}.contender"] for w in ("then", "now"))
    for line, change in (then + " -> " + now).items():
        print(f"WORSE  {' '.join(map(str, line))}: {change}")
    print(f"{len(slower)} of {len(found)} ratios worsened; {left} old lines have no new one")
    return 1 if len(slower) else 0


if __name__ == "__main__":
    sys.exit(main())
