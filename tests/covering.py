"""Which rows of a product of parameters to run, where all of them take too long."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence


def covering(rows: Iterable[Sequence[object]], strength: int) -> list[int]:
    """The numbers of some rows, in order, that show what all do: any ``strength`` values that stand
    in one row together do so in one of these, too. Values are told apart by their text.

    Each next one is the one that shows most of what none has shown yet, of equals the first."""
    shown = [
        set(itertools.combinations(enumerate(map(repr, row)), min(strength, len(row))))
        for row in rows
    ]
    chosen: list[int] = []
    missing: set[tuple[tuple[int, str], ...]] = set().union(*shown)
    # How much of what is missing a row shows only falls: what was counted before is a limit.
    queue = [(-len(combinations), number) for number, combinations in enumerate(shown)]
    heapq.heapify(queue)
    while missing:
        _, number = queue[0]
        shown[number] &= missing
        if (-len(shown[number]), number) <= min(queue[1:3], default=(1, 0)):
            heapq.heappop(queue)
            chosen.append(number)
            missing -= shown[number]
        else:
            heapq.heapreplace(queue, (-len(shown[number]), number))
    return sorted(chosen)
