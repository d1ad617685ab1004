"""The CUDA launch plans, on machines without a GPU: every element is covered, once, by a legal
launch."""

from __future__ import annotations

import math

import pytest

_C = pytest.importorskip("frozen_bn._C")

PACK, THREADS, TILE, BLOCK_COLUMNS = 8, 256, 4096, 64

# numel, channels, inner
PLANAR = [(1, 1, 8), (60800 * 512, 256, 60800), (25088 * 4, 512, 49), (2**33, 64, 2**20)]
PERIODIC = [(64 * 4, 64, 1), (2 * 2048 * 49, 2048, 1), (37 * 950, 37, 1), (70000 * 4, 1, 4)]
PERIODIC += [(2 * 2**24 * 4, 2**24, 4)]  # more columns than a grid has rows
PERIODIC += [(3 * 7, 3, 7), (2 * 4096 * 4, 4096, 4), (2**33, 256, 1)]


def plan(layout: tuple[int, int, int], summing: int = 0) -> dict:
    return _C.launch_plan(*layout, summing)


@pytest.mark.parametrize("layout", PLANAR)
def test_runs_of_a_pack_or_more_go_tile_by_tile(layout):
    chosen = plan(layout)
    assert chosen["variant"] == "planar"
    assert chosen["grid"] == (math.ceil(layout[0] / TILE), 1)
    assert chosen["block"] == (THREADS, 1)


@pytest.mark.parametrize("layout", PLANAR)
def test_each_run_has_a_partial_row_for_every_tile_that_it_touches(layout):
    numel, channels, inner = layout
    chosen = plan(layout)
    for run in {0, 1, 2, numel // inner - 1} & set(range(numel // inner)):
        first, last = run * inner // TILE, ((run + 1) * inner - 1) // TILE
        assert last - first + 1 <= chosen["segments"]
        assert (run // channels + 1) * chosen["segments"] <= chosen["partial_rows"]
    assert chosen["partial_width"] == channels


@pytest.mark.parametrize("summing", [0, 1, 40, 132])
@pytest.mark.parametrize("layout", PERIODIC)
def test_shorter_runs_go_column_by_column(layout, summing):
    _, channels, inner = layout
    chosen = plan(layout, summing)
    assert chosen["variant"] == "periodic"
    assert chosen["columns"] * PACK % (channels * inner) == 0
    (grid_x, grid_y), (block_x, block_y) = chosen["grid"], chosen["block"]
    assert 1 <= block_x * block_y <= THREADS
    assert grid_x < 2**31 and 1 <= grid_y <= 65535
    assert (grid_x - 1) * block_x < chosen["columns"] <= grid_x * block_x
    assert block_x <= BLOCK_COLUMNS and (grid_x == 1 or block_x % 4 == 0)
    assert block_x * block_y % 2 == 0 or grid_y == 1
    assert chosen["partial_rows"] == grid_y
    assert chosen["partial_width"] == chosen["columns"] * PACK


@pytest.mark.parametrize("layout", [(2**31 - 8192, 8, 64), (2**31 + 64, 8, 64), (2**33, 8, 1)])
def test_indices_are_64_bit_only_where_they_have_to_be(layout):
    assert plan(layout)["wide"] == (layout[0] > 2**31 - 1 - TILE)


LARGE = (2 * 256 * 60800, 256, 1)


def test_a_large_tensor_fills_the_device_again_and_again():
    grid_x, grid_y = plan(LARGE)["grid"]
    assert grid_x * grid_y >= 3 * 8 * 132


def test_with_sums_it_fills_the_device_twice_and_leaves_few_partial_rows():
    chosen = plan(LARGE, summing=132)
    assert math.prod(chosen["grid"]) == 8 * 132
    assert chosen["partial_rows"] == 8 * 132


@pytest.mark.parametrize("summing", [0, 132])
def test_a_thread_uses_its_coefficients_for_several_packs(summing):
    numel, channels = 2 * 1024 * 3800, 1024
    chosen = plan((numel, channels, 1), summing)
    threads = math.prod((*chosen["grid"], *chosen["block"]))
    assert numel / PACK / threads >= 3.5
