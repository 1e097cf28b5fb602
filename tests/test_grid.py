"""Token order and the definition of nearby, on cases worked out by hand."""

from __future__ import annotations

import pytest

from megatron_nuwa.grid import Cell, Extent, Grid, nearby_indices, project


def test_generation_order_is_frame_major_raster() -> None:
    grid = Grid(2, 3, 2)
    cells = [grid.cell(n) for n in range(grid.cells)]
    assert cells[:4] == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0)]
    assert cells[6] == (0, 0, 1)
    assert [grid.index_of(cell) for cell in cells] == list(range(12))


def test_projection_scales_each_axis() -> None:
    assert project(Cell(20, 10, 9), Grid(21, 21, 10), Grid(7, 21, 1)) == (6, 10, 0)
    assert project(Cell(0, 0, 5), Grid(1, 1, 10), Grid(1, 1, 77)) == (0, 0, 38)


def test_windows_are_truncated_and_never_shifted() -> None:
    grid, extent = Grid(3, 3, 1), Extent(3, 3, 1)
    assert nearby_indices(0, grid, grid, extent, causal=False) == [0, 1, 3, 4]
    assert nearby_indices(4, grid, grid, extent, causal=False) == list(range(9))
    assert nearby_indices(4, grid, grid, extent, causal=True) == [0, 1, 2, 3, 4]


def test_an_unbounded_axis_sees_all_of_it() -> None:
    grid = Grid(1, 1, 5)
    assert nearby_indices(2, grid, grid, Extent(1, 1, None), causal=False) == [0, 1, 2, 3, 4]


def test_both_readings_of_the_extent() -> None:
    assert Extent.from_reading((3, 1, None), "width") == (3, 1, None)
    assert Extent.from_reading((3, 1, None), "radius") == (7, 3, None)


@pytest.mark.parametrize("value", [(3, 2, 1), (0, 1, 1), (3, 3), (3.0, 1, 1), (True, 1, 1)])
def test_impossible_extents_are_named(value: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="extent"):
        Extent.of(value)


@pytest.mark.parametrize("value", [(3, 2), (0, 1, 1), (1.5, 1, 1)])
def test_impossible_grids_are_named(value: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="grid"):
        Grid.of(value)
