"""How a grid is cut into blocks of a few tiles of 16 rows for the tensor-core kernels.

The fewer columns a tile sees beyond those that each of its rows sees, the less is computed in
vain; the fewer a block sees in all, the less is gathered. Both depend on geometry in ways that
have no closed form (odd sides, borders, causality), so a few likely shapes are tried on a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_nuwa.grid import Grid
from megatron_nuwa.ops.tables import Geometry

TILE_ROWS = 16
# Columns that a warp computes at once.
GROUP = 32
# A group takes a warp about as long as gathering so many columns takes its block.
_GROUP_COST = 6
_TRIED_SHAPES = 10
_SAMPLED_BLOCKS = 6

Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Strip(NamedTuple):
    """How the cells of a block follow one another: the axis they run along, and how wide across."""

    along: int
    section: Grid


@dataclass(frozen=True)
class Visibility:
    """Which columns each row sees: one bool matrix (row side, column side) for each of h, w, s.

    `causal` is 0, or 1 where a column must come no later than the row, or -1 where no earlier.
    """

    grid: Grid
    column_grid: Grid
    sees: tuple[BoolArray, BoolArray, BoolArray]
    causal: int

    @classmethod
    def of(cls, geometry: Geometry, mirrored: bool) -> Visibility:
        """Rows are queries and columns keys; the other way round when mirrored."""
        h, w, s = (
            _axis_sees(side, context_side, width)
            for side, context_side, width in zip(
                geometry.grid, geometry.context_grid, geometry.extent, strict=True
            )
        )
        if mirrored:
            return cls(geometry.context_grid, geometry.grid, (h.T, w.T, s.T), -geometry.causal)
        return cls(geometry.grid, geometry.context_grid, (h, w, s), int(geometry.causal))

    def of_rows(self, rows: Array) -> tuple[Array, BoolArray]:
        """Columns that any of the rows sees, ascending, and bool (rows, columns): who sees them."""
        near = [sees[place] for sees, place in zip(self.sees, places(self.grid, rows), strict=True)]
        # Only the box around what is seen is looked at: the context may be far larger.
        h, w, s = (np.flatnonzero(axis.any(0)) for axis in near)
        seen = (
            near[2][:, s, None, None] & near[0][:, None, h, None] & near[1][:, None, None, w]
        ).reshape(len(rows), -1)
        grid = self.column_grid
        columns = ((s[:, None, None] * grid.h + h[:, None]) * grid.w + w).reshape(-1)
        if self.causal:
            seen &= self.causal * (rows[:, None] - columns) >= 0
        any_row = seen.any(0)
        return columns[any_row], seen[:, any_row]


def places(grid: Grid, cells: Array) -> tuple[Array, Array, Array]:
    """Row, column and frame of each cell."""
    return cells // grid.w % grid.h, cells % grid.w, cells // (grid.h * grid.w)


def best_blocks(visibility: Visibility, warps: int) -> list[Array]:
    """The rows of each block, 16 consecutive ones a tile, in the cheapest cut among those tried.

    A block has at most `warps` tiles.
    """
    shapes = sorted(
        _block_shapes(visibility.grid, warps * TILE_ROWS),
        key=lambda s: _columns_estimate(visibility, s),
    )
    costs = {
        (shape, strip): cost
        for shape in shapes[:_TRIED_SHAPES]
        for strip, cost in _costs_of_strips(visibility, shape, warps).items()
    }
    shape, strip = min(costs, key=lambda cut: costs[cut])
    return [
        block[strip_order(visibility.grid, shape, strip, block)]
        for block in blocks_of(visibility.grid, shape)
    ]


def blocks_of(grid: Grid, shape: Grid) -> list[Array]:
    """Cut a grid into blocks; the cells of each in generation order."""
    cells = np.arange(grid.cells)
    h, w, s = (place // side for place, side in zip(places(grid, cells), shape, strict=True))
    number = (s * grid.h + h) * grid.w + w
    order = np.argsort(number, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(number[order])) + 1)


def strip_order(grid: Grid, shape: Grid, strip: Strip, block: Array) -> Array:
    """Permutation of a block's cells into strip after strip.

    Tiles are cut from this order without regard to where strips end, so that only a block's last
    tile has rows left over.
    """
    inside = [place % side for place, side in zip(places(grid, block), shape, strict=True)]
    across = [axis for axis in range(3) if axis != strip.along]
    # The last key is the first to sort by.
    keys = [inside[axis] for axis in across] + [inside[strip.along]]
    return np.lexsort(keys + [inside[axis] // strip.section[axis] for axis in across])


def _block_shapes(grid: Grid, most: int) -> list[Grid]:
    """Shapes of `most` cells at most that cannot grow along one axis to the next width to try."""
    options = [
        sorted(
            {min(width, side) for width in (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 192)}
            | {-(-side // parts) for parts in (1, 2, 3)}
        )
        for side in grid
    ]
    fitting = {Grid(*shape) for shape in product(*options) if np.prod(shape) <= most}
    larger = {
        smaller
        for shape in fitting
        for a, choices in enumerate(options)
        if (place := choices.index(shape[a])) > 0
        for smaller in [shape._replace(**{"hws"[a]: choices[place - 1]})]
    }
    return sorted(fitting - larger)


def _strips(shape: Grid) -> list[Strip]:
    """Strips to try inside a block: 16 cells of a good one are about as long as they are wide."""
    strips = set()
    for along, section in product(range(3), product((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4))):
        clipped = Grid(*(min(width, side) for width, side in zip(section, shape, strict=True)))
        clipped = clipped._replace(**{"hws"[along]: 1})
        if shape[along] > 1 and clipped.cells in (2, 3, 4):
            strips.add(Strip(along, clipped))
    return sorted(strips) or [Strip(1, Grid(1, 1, 1))]


def _columns_estimate(visibility: Visibility, shape: Grid) -> float:
    """Columns that all blocks of a shape gather, and a share for rows that its tiles waste."""
    gathered, tiles = 1.0, -(-shape.cells // TILE_ROWS)
    for axis, (side, width) in enumerate(zip(visibility.grid, shape, strict=True)):
        sees = visibility.sees[axis]
        if visibility.causal and axis == 2:
            sees = np.tril(sees) if visibility.causal == 1 else np.triu(sees)
        starts = np.arange(0, side, width)
        gathered *= int(np.logical_or.reduceat(sees, starts, axis=0).sum())
        tiles *= len(starts)
    return gathered * (1 + tiles * TILE_ROWS / visibility.grid.cells)


def _costs_of_strips(visibility: Visibility, shape: Grid, warps: int) -> dict[Strip, float]:
    """Cost a row, for every strip of a block shape, over some blocks spread over the grid."""
    blocks = blocks_of(visibility.grid, shape)
    strips = _strips(shape)
    sample = np.unique(np.linspace(0, len(blocks) - 1, _SAMPLED_BLOCKS).round().astype(np.int64))
    costs = dict.fromkeys(strips, 0.0)
    for block in (blocks[i] for i in sample):
        columns, seen = visibility.of_rows(block)
        for strip in strips:
            order = strip_order(visibility.grid, shape, strip, block)
            tiles = np.arange(0, len(block), TILE_ROWS)
            by_tile = np.logical_or.reduceat(seen[order], tiles, axis=0)
            groups = -(-by_tile.sum(1) // GROUP)
            # All warps of a block wait for its slowest, and another block fills some of the gaps.
            computed = (groups.sum() + warps * groups.max()) / 2
            costs[strip] += len(columns) + _GROUP_COST * computed
    rows = sum(len(blocks[i]) for i in sample)
    return {strip: cost / rows for strip, cost in costs.items()}


def _axis_sees(side: int, context_side: int, width: int | None) -> BoolArray:
    """Bool (side, context_side): does a place of one axis see a place of the other's?"""
    if width is None:
        return np.ones((side, context_side), np.bool_)
    centre = np.arange(side) * context_side // side
    return np.abs(np.arange(context_side) - centre[:, None]) <= width // 2
