"""Which rows of a product `make test` runs, and which are long."""

from __future__ import annotations

import itertools

import pytest
from covering import covering

AXES = [["relu", "silu", None], [True, False], [1, 2, 4, 8], ["cpu", "emulated"], [0.0, -0.0]]
PRODUCT = [*itertools.product(*AXES)]


def meetings(rows: list[tuple], strength: int) -> set[tuple]:
    """What values meet in a row, with where they stand."""
    texts = ([*enumerate(map(repr, row))] for row in rows)
    return {combination for row in texts for combination in itertools.combinations(row, strength)}


@pytest.mark.parametrize(("strength", "fewest"), [(1, 4), (2, 12), (3, 24)])
def test_any_values_meet_in_few_rows(strength, fewest):
    chosen = covering(PRODUCT, strength)
    assert meetings([PRODUCT[n] for n in chosen], strength) == meetings(PRODUCT, strength)
    assert fewest <= len(chosen) <= 2 * fewest  # the longest axes by themselves take the fewest
    assert chosen == sorted(set(chosen)) == covering(PRODUCT, strength)


def test_what_is_not_there_need_not_be_shown():
    rows = [("a", 1), ("a", 2), ("b", 2)]
    assert covering(rows, 2) == [0, 1, 2]
    assert covering(rows, 1) == [0, 2]


def test_of_fewer_values_than_asked_for_all():
    assert covering([("a",), ("b",), ("a",)], 3) == [0, 1]
    assert covering([], 2) == []


ROWS = [*itertools.product([0, 1], "xy", [None, 2.0])]
SOON = [ROWS[number] for number in covering(ROWS, 2)]


@pytest.mark.covering(2)
@pytest.mark.parametrize(("a", "b", "c"), [*ROWS, pytest.param(5, 5, 5, marks=pytest.mark.long)])
def test_the_rest_is_long(a, b, c, request):
    assert len(SOON) == 4
    assert ((a, b, c) in SOON) == (request.node.get_closest_marker("long") is None)
