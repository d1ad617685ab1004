"""What was promised of the speed of a layer and of whole networks, and what came of it: measured
ratios of times and bytes, which have to be as small as this."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
from pandas import DataFrame, Series

from . import model_peers, peers
from .op import CHAIN
from .rows import fastest_peers
from .tables import Table

FLOOR_WORST, FLOOR_MEDIAN = 1.05, 1.0
PEER_MEAN, PEER_WORST, INPLACE_WORST = 1 / 1.6, 1 / 1.1, 1 / 3.0
#: Over ``F.batch_norm``, by mode and operation.
OVERHEAD_WORST = {
    "no-grad": {"plain": 0.8, "relu": 0.8, "residual+relu": 0.8},
    "forward": {"plain": 0.85, "relu": 0.7, "residual+relu": 0.7},
    f"chain of {CHAIN}": {"plain": 1.0, "relu": 0.75, "residual+relu": 0.65},
}
STEP_WORST, SAVED_WORST = 1.0, 1.04
#: Of a step, over torchvision's class, by layout; and under autocast, by any.
STEP_OVER_TORCHVISION = {"contiguous": 1 / 1.2, "channels_last": 1 / 1.1}
AUTOCAST_OVER_TORCHVISION = 1 / 1.15

#: What, the largest ratio that is allowed, and ratios by name.
Target = tuple[str, float, Series]


def _layers(mode: str, rows: DataFrame) -> Iterator[Target]:
    """Each mode has to meet its own, not just all together."""
    floor = rows[rows["contender"] == peers.OURS].set_index("name")["over_floor.median"]
    peer = fastest_peers(rows).set_index("name")[f"ratios.{peers.OURS}.median"]
    yield f"{mode}: every layer / floor", FLOOR_WORST, floor
    yield f"{mode}: median layer / floor", FLOOR_MEDIAN, Series({"median": floor.median()})
    mean = Series({"geometric mean": numpy.exp(numpy.log(peer).mean())})
    yield f"{mode}: mean layer / fastest peer", PEER_MEAN, mean
    yield f"{mode}: every layer / fastest peer", PEER_WORST, peer


def _best(of: DataFrame, figure: str) -> str:
    """Of the fused and the folded network."""
    names = [name for name in (model_peers.FUSED, model_peers.FOLDED) if name in of.index]
    return of.loc[names, figure].idxmin()


def targets(rows: DataFrame) -> Iterator[Target]:
    for mode in ("forward", "full"):
        # Not those that only differ in size: most fit a cache, and some are tiny.
        real = rows["shape"].map(lambda shape: shape[:2] != (1, 64))
        of_mode = rows[(rows["benchmark"] == "op") & (rows["mode"] == mode) & real]
        if len(of_mode):
            yield from _layers(mode, of_mode)
    in_place = fastest_peers(rows[(rows["benchmark"] == "op") & (rows["mode"] == "in place")])
    if len(in_place):
        ratios = in_place.set_index("name")[f"ratios.{peers.OURS}.median"]
        yield "in place: every layer / fastest peer", INPLACE_WORST, ratios
    overhead = (rows["benchmark"] == "overhead") & (rows["contender"] == "batch_norm")
    for _, row in rows[overhead & rows["mode"].isin(OVERHEAD_WORST)].iterrows():
        limit = OVERHEAD_WORST[row["mode"]][row["operation"]]
        ratio = Series({"": row[f"ratios.{peers.OURS}.median"]})
        yield f"overhead, {row['operation']}, {row['mode']} / batch_norm", limit, ratio
    for name, network in rows[rows["mode"] == "step"].groupby("name", sort=False):
        of = network[network["benchmark"] == "model"].set_index("contender")
        if len(of):
            best = _best(of, "seconds.median")
            yield f"{name}: step / BN deleted", STEP_WORST, of.loc[[best], "over_floor.median"]
            autocast = "autocast" in of["dtype"].iloc[0]
            limit = STEP_OVER_TORCHVISION[of["layout"].iloc[0]]
            limit = AUTOCAST_OVER_TORCHVISION if autocast else limit
            ratio = of.loc[model_peers.TORCHVISION, f"ratios.{best}.median"]
            yield f"{name}: step / torchvision's", limit, Series({best: ratio})
        saved = network[network["benchmark"] == "memory"].set_index("contender")
        if len(saved):
            over = saved["saved_bytes"] / saved["saved_bytes"][model_peers.DELETED]
            best = _best(saved, "saved_bytes")
            yield f"{name}: saved bytes / BN deleted", SAVED_WORST, over[[best]]


def tables(rows: DataFrame) -> Iterator[Table]:
    lines = {
        f"{what} <= {limit:.3g}": {
            "worst": f"{ratios.max():.3f}",
            "of": ratios.idxmax(),
            "missed": f"{(ratios > limit).sum()} of {len(ratios)}",
        }
        for what, limit, ratios in targets(rows)
    }
    if lines:
        found = DataFrame(lines).T.rename_axis("target")
        yield "targets, of what was run: measured ratios, the largest allowed", found
