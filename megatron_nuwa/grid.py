"""Grids of tokens, their order, and the definition of "nearby" that all else is held against.

Every picture, clip and text is a grid `(h, w, s)` of rows, columns and frames. Tokens are stored
and generated frame by frame, row by row: cell `(i, j, k)` has index `n = (k·h + i)·w + j`.

The functions here are slow and plain on purpose; `megatron_nuwa.ops` is tested against them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

ExtentReading = Literal["width", "radius"]


class Cell(NamedTuple):
    """Row, column and frame of one token."""

    i: int
    j: int
    k: int


class Grid(NamedTuple):
    """Rows, columns and frames of a token grid."""

    h: int
    w: int
    s: int

    @classmethod
    def of(cls, value: Iterable[int], name: str = "grid") -> Grid:
        """Check and convert any `(h, w, s)`; `ValueError` names the argument."""
        sides = tuple(value) if isinstance(value, Iterable) else (value,)
        if len(sides) != 3 or any(isinstance(x, bool) or not isinstance(x, int) for x in sides):
            raise ValueError(f"{name} must be three integers (rows, columns, frames), not {sides}")
        if any(side < 1 for side in sides):
            raise ValueError(f"{name} must have sides of at least 1, not {sides}")
        return cls(*sides)

    @property
    def cells(self) -> int:
        """Number of tokens."""
        return self.h * self.w * self.s

    def index_of(self, cell: Cell) -> int:
        """Place of a cell in generation order."""
        return (cell.k * self.h + cell.i) * self.w + cell.j

    def cell(self, index: int) -> Cell:
        """The cell at a place in generation order."""
        rest, j = divmod(index, self.w)
        k, i = divmod(rest, self.h)
        return Cell(i, j, k)


class Extent(NamedTuple):
    """Window width along rows, columns and frames: odd, or `None` where it is unbounded."""

    h: int | None
    w: int | None
    s: int | None

    @classmethod
    def of(cls, value: Iterable[int | None], name: str = "extent") -> Extent:
        """Check and convert any `(e_h, e_w, e_s)`; `ValueError` names the argument."""
        widths = tuple(value) if isinstance(value, Iterable) else (value,)
        if len(widths) != 3:
            raise ValueError(f"{name} must have three widths (rows, columns, frames), not {widths}")
        for axis, width in zip("hws", widths, strict=True):
            if width is None:
                continue
            if isinstance(width, bool) or not isinstance(width, int) or width < 1 or width % 2 == 0:
                raise ValueError(
                    f"{name} must be odd and positive, or None for unbounded, along every axis; "
                    f"along {axis} it is {width!r}"
                )
        return cls(*widths)

    @classmethod
    def from_reading(cls, value: Iterable[int | None], reading: ExtentReading) -> Extent:
        """Widths from the paper's numbers, read as a width (3 → 3) or as a radius (3 → 7)."""
        if reading == "width":
            return cls.of(value)
        return cls.of(None if e is None else 2 * e + 1 for e in value)


def project(cell: Cell, grid: Grid, context_grid: Grid) -> Cell:
    """The context cell that a cell of `grid` looks at (paper Eq. 6): `⌊i·h'/h⌋` along each axis."""
    return Cell(
        cell.i * context_grid.h // grid.h,
        cell.j * context_grid.w // grid.w,
        cell.k * context_grid.s // grid.s,
    )


def is_nearby(
    query: Cell, key: Cell, grid: Grid, context_grid: Grid, extent: Extent, causal: bool
) -> bool:
    """Whether a query cell sees a context cell: the definition, one pair at a time.

    Along each axis the key lies at most `⌊e/2⌋` from the query's projection (paper Eq. 7, the
    extent read as a width); when causal it also comes no later than the query in generation order.
    """
    centre = project(query, grid, context_grid)
    for place, middle, width in zip(key, centre, extent, strict=True):
        if width is not None and abs(place - middle) > width // 2:
            return False
    return not causal or context_grid.index_of(key) <= grid.index_of(query)


def nearby_indices(
    query_index: int, grid: Grid, context_grid: Grid, extent: Extent, causal: bool
) -> list[int]:
    """Indices of all context cells that one query sees, by brute force over the whole context."""
    query = grid.cell(query_index)
    return [
        n
        for n in range(context_grid.cells)
        if is_nearby(query, context_grid.cell(n), grid, context_grid, extent, causal)
    ]
