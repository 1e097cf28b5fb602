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
GROUP_COST = 6
_TRIED_CUTS = 10
_SAMPLED_BLOCKS = 6
_MOST_BOXES = 4

Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Cut(NamedTuple):
    """Blocks of so many boxes of this shape, one after another; each box fills tiles of its own."""

    shape: Grid
    boxes: int

    @property
    def box_rows(self) -> int:
        """Rows of the tiles of a box."""
        return -(-self.shape.cells // TILE_ROWS) * TILE_ROWS


class Strip(NamedTuple):
    """How the cells of a box follow one another: the axis they run along, and how wide across."""

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
        """Columns that any of the rows sees, ascending, and bool (rows, columns): who sees them.

        Rows of -1 see nothing.
        """
        is_real = rows >= 0
        if not is_real.all():
            columns, seen = self.of_rows(rows[is_real])
            all_seen = np.zeros((len(rows), len(columns)), np.bool_)
            all_seen[is_real] = seen
            return columns, all_seen
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

    A block has at most `warps` tiles; -1 fills up the last tile of a box that others follow.
    """
    cuts = sorted(
        _cuts(visibility.grid, warps), key=lambda cut: _columns_estimate(visibility, cut, warps)
    )
    costs = {
        (cut, strip): cost
        for cut in cuts[:_TRIED_CUTS]
        for strip, cost in _costs_of_strips(visibility, cut, warps).items()
    }
    cut, strip = min(costs, key=lambda tried: costs[tried])
    return [_rows(visibility.grid, cut, strip, boxes) for boxes in blocks_of(visibility.grid, cut)]


def blocks_of(grid: Grid, cut: Cut) -> list[list[Array]]:
    """The boxes of each block, with the cells of each in generation order.

    Boxes follow one another as an ox ploughs, so that those of a block are neighbours.
    """
    cells = np.arange(grid.cells)
    h, w, s = (place // side for place, side in zip(places(grid, cells), cut.shape, strict=True))
    sides = [-(-side // width) for side, width in zip(grid, cut.shape, strict=True)]
    h = np.where(s % 2, sides[0] - 1 - h, h)
    line = s * sides[0] + h
    number = line * sides[1] + np.where(line % 2, sides[1] - 1 - w, w)
    order = np.argsort(number, kind="stable")
    boxes = np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
    return [boxes[first : first + cut.boxes] for first in range(0, len(boxes), cut.boxes)]


def _rows(grid: Grid, cut: Cut, strip: Strip, boxes: list[Array]) -> Array:
    """A block's rows, strip after strip of one box after another."""
    ordered = [box[strip_order(grid, cut.shape, strip, box)] for box in boxes]
    return np.concatenate([*(padded(box, cut.box_rows) for box in ordered[:-1]), ordered[-1]])


def padded(rows: Array, length: int) -> Array:
    """So many rows, -1 where there are none."""
    return np.concatenate([rows, np.full(length - len(rows), -1)])


def strip_order(grid: Grid, shape: Grid, strip: Strip, box: Array) -> Array:
    """Permutation of a box's cells into strip after strip.

    Tiles are cut from this order without regard to where strips end, so that only a box's last tile
    has rows left over.
    """
    inside = [place % side for place, side in zip(places(grid, box), shape, strict=True)]
    across = [axis for axis in range(3) if axis != strip.along]
    # The last key is the first to sort by.
    keys = [inside[axis] for axis in across] + [inside[strip.along]]
    return np.lexsort(keys + [inside[axis] // strip.section[axis] for axis in across])


def _cuts(grid: Grid, warps: int) -> list[Cut]:
    """Boxes that fill a block alone or with others, and cannot grow along one axis to the next
    width to try without there being fewer of them."""
    options = [
        sorted(
            {min(width, side) for width in (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 192)}
            | {-(-side // parts) for parts in (1, 2, 3)}
        )
        for side in grid
    ]
    boxes = {}
    for shape in (Grid(*widths) for widths in product(*options)):
        there = int(np.prod([-(-side // width) for side, width in zip(grid, shape, strict=True)]))
        boxes[shape] = min(warps // -(-shape.cells // TILE_ROWS), there)
    fitting = {shape: count for shape, count in boxes.items() if 0 < count <= _MOST_BOXES}
    smaller = {
        less
        for shape, count in fitting.items()
        for axis, choices in enumerate(options)
        if (place := choices.index(shape[axis])) > 0
        for less in [shape._replace(**{"hws"[axis]: choices[place - 1]})]
        if fitting.get(less) == count
    }
    return [Cut(shape, fitting[shape]) for shape in sorted(fitting.keys() - smaller)]


def _strips(shape: Grid) -> list[Strip]:
    """Strips to try inside a block: 16 cells of a good one are about as long as they are wide."""
    strips = set()
    for along, section in product(range(3), product((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4))):
        clipped = Grid(*(min(width, side) for width, side in zip(section, shape, strict=True)))
        clipped = clipped._replace(**{"hws"[along]: 1})
        if shape[along] > 1 and clipped.cells in (2, 3, 4):
            strips.add(Strip(along, clipped))
    return sorted(strips) or [Strip(1, Grid(1, 1, 1))]


def _columns_estimate(visibility: Visibility, cut: Cut, warps: int) -> float:
    """Columns that all blocks of a cut gather, and a share for rows that its tiles waste."""
    grid, columns, boxes = visibility.grid, 1.0, 1
    for axis, (side, width) in enumerate(zip(grid, cut.shape, strict=True)):
        sees = visibility.sees[axis]
        if visibility.causal and axis == 2:
            sees = np.tril(sees) if visibility.causal == 1 else np.triu(sees)
        # Boxes of a block lie side by side, mostly along w.
        across = width * cut.boxes if axis == 1 else width
        starts = np.arange(0, side, min(across, side))
        columns *= int(np.logical_or.reduceat(sees, starts, axis=0).sum())
        boxes *= -(-side // width)
    blocks = -(-boxes // cut.boxes)
    return columns * (1 + blocks * warps * TILE_ROWS / grid.cells)


def _costs_of_strips(visibility: Visibility, cut: Cut, warps: int) -> dict[Strip, float]:
    """Cost a row, for every strip of a box, over some blocks spread over the grid."""
    blocks = blocks_of(visibility.grid, cut)
    strips = _strips(cut.shape)
    sample = np.unique(np.linspace(0, len(blocks) - 1, _SAMPLED_BLOCKS).round().astype(np.int64))
    costs = dict.fromkeys(strips, 0.0)
    for block in (blocks[i] for i in sample):
        cells = np.sort(np.concatenate(block))
        columns, seen = visibility.of_rows(cells)
        # A row of -1 sees nothing.
        seen = np.pad(seen, ((0, 1), (0, 0)))
        for strip in strips:
            rows = _rows(visibility.grid, cut, strip, block)
            of_rows = seen[np.where(rows < 0, len(cells), np.searchsorted(cells, rows))]
            tiles = np.arange(0, len(rows), TILE_ROWS)
            groups = -(-np.logical_or.reduceat(of_rows, tiles, axis=0).sum(1) // GROUP)
            # All warps of a block wait for its slowest, and another block fills some of the gaps.
            computed = (groups.sum() + warps * groups.max()) / 2
            costs[strip] += len(columns) + GROUP_COST * computed
    rows_of_sample = sum(len(box) for i in sample for box in blocks[i])
    return {strip: cost / rows_of_sample for strip, cost in costs.items()}


def _axis_sees(side: int, context_side: int, width: int | None) -> BoolArray:
    """Bool (side, context_side): does a place of one axis see a place of the other's?"""
    if width is None:
        return np.ones((side, context_side), np.bool_)
    centre = np.arange(side) * context_side // side
    return np.abs(np.arange(context_side) - centre[:, None]) <= width // 2
