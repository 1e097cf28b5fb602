"""Neighbour tables as the CPU kernels walk them: up to four rows share one list of neighbours.

A block is a small tile of the grid, because cells that lie close together see much the same; the
tile that makes the lists shortest is taken. `csrc/cpu/kernels.h` says how a table is packed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.grid import Grid
from megatron_nuwa.ops.tables import Geometry, build_pairs

BLOCK_ROWS = 4
LIST_PADDING = 16
ENTRY_BITS = 4
MOST_NEIGHBOURS = 1 << (31 - ENTRY_BITS)

_CACHED_TABLES = 128
# Tiles (rows, columns, frames) of four cells.
_TILES = ((1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4))


@lru_cache(maxsize=_CACHED_TABLES)
def block_table(geometry: Geometry, mirrored: bool) -> Tensor:
    """The keys of each block of queries; mirrored, the queries of each block of keys.

    int32 (n,) on the CPU: number of blocks, rows (blocks, 4) with -1 for none, starts (blocks + 1),
    counts (blocks), entries `neighbour << 4 | rows that see it`.
    """
    row, neighbour = build_pairs(geometry)
    grid, neighbours = geometry.grid, geometry.context_grid.cells
    if mirrored:
        row, neighbour = neighbour, row
        grid, neighbours = geometry.context_grid, geometry.grid.cells
    if neighbours > MOST_NEIGHBOURS:
        raise ValueError(f"grid must have at most {MOST_NEIGHBOURS} cells for the cpu backend")
    tiles = [tile for tile in _TILES if all(t <= g for t, g in zip(tile, grid, strict=True))]
    tables = (tiled_table(row, neighbour, neighbours, _tile_cells(grid, tile)) for tile in tiles)
    best = tiled_table(row, neighbour, neighbours, linear_cells(grid.cells))
    for table in tables:
        if len(table) < len(best):
            best = table
    return best


def linear_cells(cells: int) -> Tensor:
    """Blocks of four successive cells, (blocks, 4), -1 where there are no more."""
    return F.pad(torch.arange(cells), (0, -cells % BLOCK_ROWS), value=-1).view(-1, BLOCK_ROWS)


def tiled_table(row: Tensor, neighbour: Tensor, neighbours: int, cells: Tensor) -> Tensor:
    """The packed table of (row, neighbour) pairs in blocks of these `cells`, (blocks, 4)."""
    place = torch.empty(int(cells.max()) + 1, dtype=torch.int64)
    present = cells.flatten() >= 0
    place[cells.flatten()[present]] = torch.arange(cells.numel())[present]
    block, bit = place[row] // BLOCK_ROWS, place[row] % BLOCK_ROWS
    pair, inverse = torch.unique(block * neighbours + neighbour, return_inverse=True)
    seen_by = torch.zeros_like(pair).scatter_add_(0, inverse, 1 << bit)
    entry = (pair % neighbours) << ENTRY_BITS | seen_by
    return _packed(cells, pair // neighbours, entry)


def _packed(rows: Tensor, block: Tensor, entry: Tensor) -> Tensor:
    """A packed table from `rows` (blocks, 4) and sorted (block, entry) pairs."""
    blocks = rows.shape[0]
    counts = torch.bincount(block, minlength=blocks)
    padded = (counts + LIST_PADDING - 1) // LIST_PADDING * LIST_PADDING
    starts = F.pad(padded.cumsum(0), (1, 0))
    place = starts[block] + torch.arange(len(block)) - (counts.cumsum(0) - counts)[block]
    if int(starts[-1]) >= 2**31:
        raise ValueError("extent makes the neighbour tables of the cpu backend too large")
    # Padding repeats a neighbour of the same block, so that loading it costs nothing.
    last = torch.zeros(blocks, dtype=torch.int64).index_put_((block,), entry & -16)
    entries = last.repeat_interleave(padded)
    entries[place] = entry
    packed = (torch.tensor([blocks]), rows.flatten(), starts, counts, entries)
    return torch.cat([part.to(torch.int32) for part in packed])


def _tile_cells(grid: Grid, tile: tuple[int, int, int]) -> Tensor:
    """The cells of every tile, (tiles, 4), tiles in generation order."""
    h, w, s = (-(-side // t) * t for side, t in zip(grid, tile, strict=True))
    cells = torch.arange(grid.cells).view(grid.s, grid.h, grid.w)
    cells = F.pad(cells, (0, w - grid.w, 0, h - grid.h, 0, s - grid.s), value=-1)
    th, tw, ts = tile
    return (
        cells.view(s // ts, ts, h // th, th, w // tw, tw)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(-1, BLOCK_ROWS)
        .contiguous()
    )
