"""Tables for the tensor-core kernels: what each warp of each thread block gathers and computes.

A *tile* is 16 rows, the height of one matrix instruction, and belongs to one warp; a *block* is
eight tiles that lie close together and share one gathered list of columns. Rows are queries and
columns keys; in the mirrored tables, which the gradients of keys and values walk, rows are keys and
columns queries. Borders, causality and the scaling between grids live here alone.

A block's columns pass through a ring of `STAGES` chunks in shared memory. At step `t` chunks `t-1`
and `t` may be read while `t+1` and `t+2` arrive, so a warp's columns are packed 16 to a *group* as
long as they lie in two neighbouring chunks, and the group is computed at the step of its last one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_nuwa.ops.tables import Geometry, key_table, query_table
from megatron_nuwa.ops.tilings import TILE_ROWS, WARPS, Visibility, best_blocks

STAGES = 4
GROUP = 16
_LANES = 32
# Rows of shared memory whose slots differ modulo this lie in different groups of banks.
_BANKS = 8
_CACHED_GEOMETRIES = 64

Array = npt.NDArray[np.int64]


class WarpTables(NamedTuple):
    """What the tensor-core kernels walk; all int32, but `entries`, which is int16.

    `block_chunks` (blocks + 1): first chunk of each block in `columns`.
    `columns` (chunks · chunk): the column behind every place of the ring, -1 = none.
    `rows` (blocks · 128): the row behind every row of the tiles, -1 = none.
    `group_starts` (blocks · 8): first group of each tile.
    `group_ends` (chunks · 8): one past the last group of each warp that is ready at this step.
    `entries` (groups + 1, 32): for each lane the ring slot (low byte) of column `lane % 16`, and
    one bit for each of its eight scores (high byte): is the pair visible? One spare group ends it.
    """

    block_chunks: Tensor
    columns: Tensor
    rows: Tensor
    group_starts: Tensor
    group_ends: Tensor
    entries: Tensor

    def to(self, device: torch.device) -> WarpTables:
        """The same tables on another device."""
        return WarpTables(*(t.to(device) for t in self))


class RowTables(NamedTuple):
    """The neighbours of each row one after another, for the fp32 kernels.

    `starts` int64 (rows + 1); `columns` int32 (pairs,), ascending within a row.
    """

    starts: Tensor
    columns: Tensor


def chunk_columns(head_dim: int) -> int:
    """Columns of one chunk: as many as keep the ring at 64 KiB or less."""
    return 32 if head_dim > 64 else 64


@lru_cache(maxsize=_CACHED_GEOMETRIES)
def warp_tables(geometry: Geometry, mirrored: bool, chunk: int, device: torch.device) -> WarpTables:
    """The tables of a geometry on a device; made once."""
    if device.type != "cpu":
        return warp_tables(geometry, mirrored, chunk, torch.device("cpu")).to(device)
    return _build(Visibility.of(geometry, mirrored), chunk)


@lru_cache(maxsize=_CACHED_GEOMETRIES)
def row_tables(geometry: Geometry, mirrored: bool, device: torch.device) -> RowTables:
    """Every row's neighbours without padding; made once."""
    table = (query_table if mirrored else key_table)(geometry, torch.device("cpu"))
    starts = torch.zeros(table.index.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(table.valid.sum(1), 0, out=starts[1:])
    return RowTables(starts.to(device), table.index[table.valid].int().to(device))


def _build(visibility: Visibility, chunk: int) -> WarpTables:
    block_chunks, columns, rows, tile_groups, slots, masks, ends = [0], [], [], [], [], [], []
    for block in best_blocks(visibility):
        seen_columns, seen = visibility.of_rows(block)
        chunks = max(-(-len(seen_columns) // chunk), 1)
        block_chunks.append(block_chunks[-1] + chunks)
        columns.append(_padded(seen_columns[_dealt(len(seen_columns), chunks)], chunks * chunk))
        rows.append(_padded(block, WARPS * TILE_ROWS))
        # From here on a column is its place in the dealt order.
        seen = seen[:, _dealt(len(seen_columns), chunks)]
        block_ends = np.zeros((chunks, WARPS), np.int64)
        for warp in range(WARPS):
            tile = seen[warp * TILE_ROWS : (warp + 1) * TILE_ROWS]
            tile_slots, tile_masks, steps = _groups_of_tile(tile, chunk)
            slots.append(tile_slots)
            masks.append(tile_masks)
            tile_groups.append(len(steps))
            block_ends[:, warp] = np.searchsorted(steps, np.arange(chunks), side="right")
        ends.append(block_ends)

    starts = np.concatenate([[0], np.cumsum(tile_groups)])
    first = starts[:-1].reshape(-1, WARPS)
    group_ends = np.concatenate([end + first[i] for i, end in enumerate(ends)])
    entries = _entries(np.concatenate(slots), np.concatenate(masks))
    return WarpTables(
        _int32(np.array(block_chunks)),
        _int32(np.concatenate(columns)),
        _int32(np.concatenate(rows)),
        _int32(starts[:-1]),
        _int32(group_ends.reshape(-1)),
        torch.from_numpy(entries.view(np.int16)),
    )


def _dealt(count: int, chunks: int) -> Array:
    """The order in which a block's columns fill its chunks: dealt like cards.

    Raster order would keep one warp busy at one step and its neighbour at the next, and all meet
    at a barrier between two steps; dealt, every chunk holds a like share of every warp's columns.
    """
    return np.concatenate([np.arange(start, count, chunks) for start in range(chunks)])


def _groups_of_tile(tile: npt.NDArray[np.bool_], chunk: int) -> tuple[Array, Array, Array]:
    """Ring slots (groups, 16), row masks (groups, 16) and step (groups,) of one tile's columns."""
    places = _spread(np.flatnonzero(tile.any(0)), chunk)
    chunk_of = places // chunk
    # One past the last column that may share a group with this one.
    limits = np.searchsorted(chunk_of, chunk_of + 2).tolist()
    bounds = [0]
    while bounds[-1] < len(places):
        bounds.append(min(bounds[-1] + GROUP, limits[bounds[-1]]))
    start, last = np.array(bounds[:-1], np.int64), np.array(bounds[1:], np.int64) - 1
    index = start[:, None] + np.arange(GROUP)
    is_real = index <= last[:, None]
    # Padding repeats a column that is there, so that no row is read that was never gathered.
    index = np.minimum(index, last[:, None])
    bits = (1 << np.arange(tile.shape[0])) @ tile[:, places]
    return places[index] % (STAGES * chunk), bits[index] * is_real, chunk_of[last]


def _spread(places: Array, chunk: int) -> Array:
    """Reorder the places within each chunk so that every run of them falls on all banks alike."""
    kind = places // chunk * _BANKS + places % _BANKS
    by_kind = np.argsort(kind, kind="stable")
    first = np.searchsorted(kind[by_kind], kind[by_kind])
    last = np.searchsorted(kind[by_kind], kind[by_kind], side="right")
    share = np.empty(len(places))
    share[by_kind] = (np.arange(len(places)) - first + 0.5) / (last - first)
    return places[np.lexsort((places % _BANKS, share, places // chunk))]


def _entries(slots: Array, masks: Array) -> npt.NDArray[np.uint16]:
    """Pack slots and masks (groups, 16) as the lanes read them."""
    # `ldmatrix` reads eight rows at once: those that meet in a bank go to different halves.
    order = np.argsort(slots % _BANKS, axis=1, kind="stable")
    order = np.concatenate([order[:, 0::2], order[:, 1::2]], axis=1)
    slots, masks = np.take_along_axis(slots, order, 1), np.take_along_axis(masks, order, 1)
    lane, element = np.arange(_LANES)[:, None], np.arange(8)
    row = lane // 4 + 8 * (element // 2 % 2)
    column = 8 * (element // 4) + 2 * (lane % 4) + element % 2
    visible = masks[:, column] >> row & 1
    entries = slots[:, np.arange(_LANES) % GROUP] | (visible << np.arange(8)).sum(2) << 8
    spare = np.zeros((1, _LANES), np.int64)
    return np.concatenate([entries, spare]).astype(np.uint16, order="C")


def _padded(values: Array, length: int) -> Array:
    return np.concatenate([values, np.full(length - len(values), -1)])


def _int32(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
