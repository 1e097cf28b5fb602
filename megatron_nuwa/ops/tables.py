"""Neighbour tables: which context cells each query sees, worked out once for a geometry.

Truncation at borders, causality and the scaling between grids of different size live here alone;
the kernels only walk a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid

_CACHED_GEOMETRIES = 64


class Geometry(NamedTuple):
    """Everything that decides who sees whom; hashable, so that tables can be cached by it."""

    grid: Grid
    context_grid: Grid
    extent: Extent
    causal: bool

    @property
    def sees_everything(self) -> bool:
        """Whether every window covers the whole context, causality aside."""
        return all(
            width is None
            or all(
                centre - width // 2 <= 0 and centre + width // 2 >= context_side - 1
                for centre in (place * context_side // side for place in range(side))
            )
            for side, context_side, width in zip(
                self.grid, self.context_grid, self.extent, strict=True
            )
        )


@dataclass(frozen=True)
class NeighbourTable:
    """For each row its neighbours, padded to the widest row.

    `index` int64 (rows, width): neighbours in ascending order, then zeros as padding.
    `valid` bool (rows, width): False where `index` is padding.
    """

    index: Tensor
    valid: Tensor

    @property
    def width(self) -> int:
        """Neighbours of the row that has most."""
        return self.index.shape[1]

    @property
    def pairs(self) -> int:
        """Number of (row, neighbour) pairs."""
        return int(self.valid.sum())

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.index, self.valid))

    def to(self, device: torch.device) -> NeighbourTable:
        """The same table on another device."""
        return NeighbourTable(self.index.to(device), self.valid.to(device))


@lru_cache(maxsize=_CACHED_GEOMETRIES)
def key_table(geometry: Geometry, device: torch.device) -> NeighbourTable:
    """The keys that each query sees: one row a query."""
    return _build_key_table(geometry).to(device)


@lru_cache(maxsize=_CACHED_GEOMETRIES)
def query_table(geometry: Geometry, device: torch.device) -> NeighbourTable:
    """The mirror of `key_table`: the queries that see each key, one row a key."""
    table = _build_key_table(geometry)
    queries = torch.arange(table.index.shape[0]).unsqueeze(1).expand_as(table.index)
    query, key = queries[table.valid], table.index[table.valid]
    order = torch.argsort(key, stable=True)
    return table_of_pairs(key[order], query[order], geometry.context_grid.cells).to(device)


@lru_cache(maxsize=_CACHED_GEOMETRIES)
def dense_mask(geometry: Geometry, device: torch.device) -> Tensor:
    """Bool (queries, keys): True where the query sees the key."""
    table = _build_key_table(geometry)
    mask = torch.zeros(geometry.grid.cells, geometry.context_grid.cells, dtype=torch.bool)
    # Padding points at key 0, so it must add nothing rather than overwrite with False.
    mask.view(torch.uint8).scatter_add_(1, table.index, table.valid.to(torch.uint8))
    return mask.to(device)


def _build_key_table(geometry: Geometry) -> NeighbourTable:
    return table_of_pairs(*build_pairs(geometry), geometry.grid.cells)


def build_pairs(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """All (query, key) pairs, int64, sorted by query and then by key."""
    grid, context_grid, extent, causal = geometry
    rows, columns, frames = (
        _axis_window(side, context_side, width)
        for side, context_side, width in zip(grid, context_grid, extent, strict=True)
    )
    # Axes: query frame, row, column, then key frame, row, column; both halves are then in
    # generation order.
    key_frame = frames.view(grid.s, 1, 1, -1, 1, 1)
    key_row = rows.view(1, grid.h, 1, 1, -1, 1)
    key_column = columns.view(1, 1, grid.w, 1, 1, -1)
    valid = (key_frame >= 0) & (key_row >= 0) & (key_column >= 0)
    key = (key_frame * context_grid.h + key_row) * context_grid.w + key_column
    key, valid = key.reshape(grid.cells, -1), valid.reshape(grid.cells, -1)
    if causal:
        valid = valid & (key <= torch.arange(grid.cells).unsqueeze(1))
    query = torch.arange(grid.cells).unsqueeze(1).expand_as(key)
    return query[valid], key[valid]


def _axis_window(side: int, context_side: int, width: int | None) -> Tensor:
    """Context places that each place of one axis sees, (side, places), -1 outside the grid."""
    if width is None:
        return torch.arange(context_side).expand(side, context_side)
    reach = min(width // 2, context_side - 1)
    centre = torch.arange(side) * context_side // side
    place = centre.unsqueeze(1) + torch.arange(-reach, reach + 1)
    return place.masked_fill(place >= context_side, -1).clamp(min=-1)


def table_of_pairs(row: Tensor, neighbour: Tensor, rows: int) -> NeighbourTable:
    """A table of (row, neighbour) pairs, sorted by row and then by neighbour."""
    counts = torch.bincount(row, minlength=rows)
    starts = torch.cumsum(counts, 0) - counts
    slot = torch.arange(len(row)) - starts[row]
    width = max(int(counts.max()), 1)
    index = torch.zeros(rows, width, dtype=torch.int64)
    valid = torch.zeros(rows, width, dtype=torch.bool)
    index[row, slot] = neighbour
    valid[row, slot] = True
    return NeighbourTable(index, valid)
