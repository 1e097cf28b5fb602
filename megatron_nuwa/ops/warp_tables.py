"""Tables for the tensor-core kernels: what each warp of each thread block gathers and computes.

A *tile* is 16 rows, the height of one matrix instruction, and belongs to one warp; a *block* is a
few tiles that lie close together and share one gathered list of columns. Rows are queries and
columns keys; in the mirrored tables, which the gradients of keys and values walk, rows are keys and
columns queries. Borders, causality and the scaling between grids live here alone.

A block's columns pass through a ring of a few stages in shared memory, a chunk each, and before
them its own rows. At step `t` chunks `t-1` and `t` may be read while others arrive, so a warp's
columns are packed 32 to a *group* as long as they lie in two neighbouring chunks, and the group is
computed at the step of its last one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_nuwa.ops.tables import Geometry, key_table, query_table
from megatron_nuwa.ops.tilings import GROUP, TILE_ROWS, Visibility, best_blocks, padded

# Rows of shared memory whose slots differ modulo this lie in different groups of banks.
_BANKS = 8
# A geometry has six: one a pass, on the CPU and on a device.
_CACHED_TABLES = 256

# What a kernel sums.
Sums = Literal["outputs", "query gradients", "context gradients"]
# Queries; queries, gradients and outputs; keys and values.
ROW_ROUNDS: dict[Sums, int] = {"outputs": 1, "query gradients": 2, "context gradients": 1}
Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Shape(NamedTuple):
    """What the tables must know of a kernel.

    Warps a block, columns a chunk, stages of the ring, bytes a column, how many times a block's
    rows come (two of their tensors pass through the ring side by side), and how many teams of so
    many warps a multiprocessor has.
    """

    warps: int
    chunk: int
    stages: int
    row_bytes: int
    row_rounds: int = 1
    teams: int = 1

    @property
    def row_chunks(self) -> int:
        """How many chunks of rows come before a block's columns."""
        return self.row_rounds * -(-self.warps * TILE_ROWS // self.chunk)

    def offsets(self, slots: Array) -> Array:
        """Where ring slots start in shared memory, with the turn of their 16-byte segments.

        It is `swizzled(slot, 0)` of tiles.cuh; other segments differ by exclusive or.
        """
        turns = slots >> 1 & 3 if self.row_bytes == 64 else slots & 7
        return slots * self.row_bytes + (turns << 4)


class WarpTables(NamedTuple):
    """What the tensor-core kernels walk; all int32.

    `block_chunks` (blocks + 1): first chunk of each block in `columns`.
    `columns` (chunks · chunk): what is behind every place of the ring, -1 = nothing: the rows
    of a block in its first chunks, each time tile after tile, and its columns in the others.
    `rows` (blocks · warps · 16): the row behind every row of the tiles, -1 = none.
    `group_starts` (blocks · warps): first group of each tile.
    `group_ends` (chunks · warps): one past the last group of each warp ready at this step.
    `entries` (groups + 1, 32): for each lane the offset in the ring of column `lane`, from where
    the block's first chunk lies (low half), and one bit for each of its sixteen scores (high half):
    is the pair visible?

    Tiles of a block see ever fewer columns. Kernels read ahead: a spare group ends the tables.
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


def shape_of(head_dim: int, sums: Sums, is_large: bool) -> Shape:
    """The kernel for a head size that is built: `layout_of` of tiles.cuh.

    `is_large`: does a multiprocessor have the shared memory of compute capability 9.0?
    """
    chunk = 32 if head_dim > 64 else 64
    if sums == "context gradients" and head_dim == 64:
        warps, stages = (6, 6) if is_large else (5, 4)
    else:
        warps, stages = (8, 7 if head_dim == 64 else 6) if is_large else (7, 4)
    return Shape(warps, chunk, stages, 2 * head_dim, ROW_ROUNDS[sums], 1 if head_dim > 64 else 2)


@lru_cache(maxsize=_CACHED_TABLES)
def warp_tables(
    geometry: Geometry, mirrored: bool, shape: Shape, device: torch.device
) -> WarpTables:
    """The tables of a geometry on a device; made once."""
    if device.type != "cpu":
        return warp_tables(geometry, mirrored, shape, torch.device("cpu")).to(device)
    return _build(Visibility.of(geometry, mirrored), shape)


@lru_cache(maxsize=_CACHED_TABLES)
def row_tables(geometry: Geometry, mirrored: bool, device: torch.device) -> RowTables:
    """Every row's neighbours without padding; made once."""
    table = (query_table if mirrored else key_table)(geometry, torch.device("cpu"))
    starts = torch.zeros(table.index.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(table.valid.sum(1), 0, out=starts[1:])
    return RowTables(starts.to(device), table.index[table.valid].int().to(device))


def _build(visibility: Visibility, shape: Shape) -> WarpTables:
    warps, chunk, stages = shape.warps, shape.chunk, shape.stages
    blocks = [_Block.of(visibility, rows, shape) for rows in best_blocks(visibility, warps)]
    # From here on a column is its place among its block's chunks.
    turned = np.split(
        _turned(np.concatenate([block.by_warp for block in blocks])),
        np.cumsum([len(block.by_warp) for block in blocks])[:-1],
    )
    tile_groups, places, masks, ends = [], [], [], []
    for block, order in zip(blocks, turned, strict=True):
        block.reorder(order)
        block_ends = np.zeros((shape.row_chunks + block.chunks, warps), np.int64)
        for warp in range(warps):
            tile = block.seen[warp * TILE_ROWS : (warp + 1) * TILE_ROWS]
            tile_places, tile_masks, steps = _groups_of_tile(tile, chunk)
            places.append(tile_places)
            masks.append(tile_masks)
            tile_groups.append(len(steps))
            done = np.searchsorted(steps, np.arange(block.chunks), side="right")
            block_ends[shape.row_chunks :, warp] = done
        ends.append(block_ends)

    starts = np.concatenate([[0], np.cumsum(tile_groups)])
    first = starts[:-1].reshape(-1, warps)
    group_ends = np.concatenate([end + first[i] for i, end in enumerate(ends)])
    slots = (np.concatenate(places) + shape.row_chunks * chunk) % (stages * chunk)
    columns = [part for block in blocks for part in (block.row_places(shape), block.columns)]
    return WarpTables(
        int32(np.cumsum([0, *(len(end) for end in ends)])),
        int32(np.concatenate(columns)),
        int32(np.concatenate([block.rows for block in blocks])),
        int32(starts[:-1]),
        int32(group_ends.reshape(-1)),
        torch.from_numpy(_entries(shape, slots, np.concatenate(masks)).view(np.int32)),
    )


class _Block:
    """A block's rows, the columns (chunks · chunk,) that they see, and who sees which.

    `rows` (warps · 16) are -1 where there are none, tiles that see many columns before those that
    see few; `seen` bool (rows, chunks · chunk); `by_warp` bool (chunks, chunk, warps).
    """

    def __init__(self, rows: Array, columns: Array, seen: BoolArray, shape: Shape) -> None:
        self.chunks = len(columns) // shape.chunk
        all_rows = padded(rows, shape.warps * TILE_ROWS)
        missing = len(all_rows) - len(rows)
        tiles = np.pad(seen, ((0, missing), (0, 0))).reshape(shape.warps, TILE_ROWS, -1)
        order = np.argsort(-tiles.any(1).sum(1), kind="stable")
        self.rows, tiles = all_rows.reshape(-1, TILE_ROWS)[order].reshape(-1), tiles[order]
        self.columns, self.seen = columns, tiles.reshape(len(self.rows), -1)
        self.by_warp = tiles.any(1).T.reshape(self.chunks, shape.chunk, shape.warps)

    @classmethod
    def of(cls, visibility: Visibility, rows: Array, shape: Shape) -> _Block:
        """Columns are dealt to the chunks like cards.

        Raster order would keep one warp busy at one step and its neighbour at the next; dealt,
        every chunk holds a like share of every warp's columns.
        """
        columns, seen = visibility.of_rows(rows)
        chunks = max(-(-len(columns) // shape.chunk), 1)
        dealt = np.full((chunks, shape.chunk), -1)
        for first in range(chunks):
            own = np.arange(first, len(columns), chunks)
            dealt[first, : len(own)] = own
        order = dealt.reshape(-1)
        is_real = order >= 0
        if not len(columns):
            columns, seen = np.zeros(1, np.int64), np.zeros((len(rows), 1), np.bool_)
        return cls(rows, np.where(is_real, columns[order], -1), seen[:, order] & is_real, shape)

    def row_places(self, shape: Shape) -> Array:
        """The rows as they pass through the ring, each time from a chunk's start on."""
        places = shape.row_chunks // shape.row_rounds * shape.chunk
        return np.tile(padded(self.rows, places), shape.row_rounds)

    def reorder(self, order: Array) -> None:
        """Let each chunk's columns stand in the order `order` (chunks, chunk)."""
        flat = (order + np.arange(self.chunks)[:, None] * order.shape[1]).reshape(-1)
        self.columns, self.seen = self.columns[flat], self.seen[:, flat]


def _turned(by_warp: BoolArray) -> Array:
    """An order (chunks, chunk) of each chunk's columns that spreads every warp's over all banks.

    A column's bank is its place modulo 8. Columns choose one after another, those first that most
    warps see, the bank in which the warps that see them have seen the fewest so far, and of which
    the chunk has places left.
    """
    chunks, chunk, warps = by_warp.shape
    counts = np.zeros((chunks, warps, _BANKS), np.int32)
    taken = np.zeros((chunks, _BANKS), np.int64)
    order, every = np.zeros((chunks, chunk), np.int64), np.arange(chunks)
    for column in np.argsort(-by_warp.sum(2), axis=1, kind="stable").T:
        sees = by_warp[every, column]
        cost = (counts * sees[:, :, None]).sum(1) * chunk + taken
        bank = np.where(taken < chunk // _BANKS, cost, np.iinfo(np.int64).max).argmin(1)
        order[every, taken[every, bank] * _BANKS + bank] = column
        taken[every, bank] += 1
        counts[every, :, bank] += sees
    return order


def _groups_of_tile(tile: BoolArray, chunk: int) -> tuple[Array, Array, Array]:
    """Places (groups, 32), row masks (groups, 32) and step (groups,) of one tile's columns."""
    left = np.flatnonzero(tile.any(0))
    groups = []
    while len(left):
        chunk_of = left // chunk
        # The first chunk must go before it is overwritten; others fill the group up.
        due = int(np.searchsorted(chunk_of, chunk_of[0] + 1))
        end = int(np.searchsorted(chunk_of, chunk_of[0] + 2))
        if due >= GROUP:
            chosen = _over_banks(left[:due], GROUP)
        else:
            chosen = np.concatenate(
                [np.arange(due), due + _over_banks(left[due:end], GROUP - due, left[:due])]
            )
        groups.append(left[chosen])
        left = np.delete(left, chosen)
    groups.sort(key=lambda group: group.max() // chunk)
    # Padding repeats a column that is there, so that no row is read that was never gathered.
    places = np.empty((len(groups), GROUP), np.int64)
    for own, group in zip(places, groups, strict=True):
        own[: len(group)], own[len(group) :] = group, group[-1]
    is_real = np.arange(GROUP) < np.array([len(group) for group in groups], np.int64)[:, None]
    bits = (1 << np.arange(tile.shape[0])) @ tile[:, places.reshape(-1)]
    steps = np.array([group.max() // chunk for group in groups], np.int64)
    return places, bits.reshape(places.shape) * is_real, steps


def _over_banks(places: Array, most: int, beside: Array | None = None) -> Array:
    """Which of the places to take, `most` at most, for as few as can be of one bank.

    Those `beside` them are taken already.
    """
    bank = places % _BANKS
    taken = np.bincount(() if beside is None else beside % _BANKS, minlength=_BANKS)
    by_bank = np.argsort(bank, kind="stable")
    first = np.searchsorted(bank[by_bank], bank[by_bank])
    height = np.empty(len(places), np.int64)
    height[by_bank] = np.arange(len(places)) - first + taken[bank[by_bank]]
    return np.sort(np.argsort(height, kind="stable")[:most])


def _entries(shape: Shape, slots: Array, masks: Array) -> npt.NDArray[np.uint32]:
    """Pack slots and masks (groups, 32) as the lanes read them."""
    # `ldmatrix` reads eight rows at once: those that meet in a bank go to different octets. One is
    # filled up with a column that it has, which costs nothing to read again.
    octets = GROUP // 8
    order = np.argsort(np.where(masks > 0, slots % _BANKS, _BANKS), axis=1, kind="stable")
    order = np.concatenate([order[:, first::octets] for first in range(octets)], axis=1)
    slots, masks = np.take_along_axis(slots, order, 1), np.take_along_axis(masks, order, 1)
    first = np.repeat(slots[:, ::8], 8, axis=1)
    own = np.where(np.repeat(masks[:, ::8], 8, axis=1) > 0, first, slots[:, :1])
    slots = np.where(masks > 0, slots, own)
    lane, element = np.arange(GROUP)[:, None], np.arange(GROUP // 2)
    row = lane // 4 + 8 * (element // 2 % 2)
    column = 8 * (element // 4) + 2 * (lane % 4) + element % 2
    visible = masks[:, column] >> row & 1
    entries = shape.offsets(slots) | (visible << element).sum(2) << 16
    spare = np.zeros((1, GROUP), np.int64)
    return np.concatenate([entries, spare]).astype(np.uint32, order="C")


def int32(values: Array) -> Tensor:
    """As the kernels read numbers."""
    return torch.from_numpy(values.astype(np.int32))
