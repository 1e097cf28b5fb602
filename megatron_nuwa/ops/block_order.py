"""In which order a table's blocks stand, so that teams of warps get like shares of the work.

Teams take items one after another, an item being a block for one head of one batch item, heads
first, then blocks, then batch items: of all items team `t` gets `t`, `t + teams`, `t + 2 · teams`,
and so on. Where blocks differ, as in causal windows, some numbers of heads and teams give one team
the heavy blocks again and again: on 132 multiprocessors, with 20 heads, a fifth more than the mean.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.ops.tilings import GROUP_COST, TILE_ROWS
from megatron_nuwa.ops.warp_tables import Shape, WarpTables, int32, warp_tables

_MOST_RUNS = 8
# The grid's own order, in which neighbours follow one another, reads the least from memory; another
# one must be worth it.
_WORTH = 0.97
_CACHED_ORDERS = 256
_CACHED_TABLES = 64

Array = npt.NDArray[np.int64]
Costs = npt.NDArray[np.float64]


class Sharing(NamedTuple):
    """Among how many teams the items of a call are shared out."""

    batch: int
    heads: int
    teams: int

    def imbalance(self, costs: Costs) -> float:
        """The most that any team has to do, as a multiple of what teams have on average."""
        items = np.tile(np.repeat(costs, self.heads), self.batch)
        of_teams = np.pad(items, (0, -len(items) % self.teams)).reshape(-1, self.teams).sum(0)
        return float(of_teams.max() / of_teams.mean())


def shared_tables(
    geometry: Geometry, mirrored: bool, shape: Shape, sharing: Sharing, device: torch.device
) -> WarpTables:
    """The tables of a geometry on a device, their blocks in the best order for so many teams."""
    order = _best_order_of(geometry, mirrored, shape, sharing)
    if order is None:
        return warp_tables(geometry, mirrored, shape, device)
    return _ordered_tables(geometry, mirrored, shape, order, device)


def best_order(costs: Costs, sharing: Sharing) -> tuple[int, ...] | None:
    """A permutation of blocks of these costs that evens out the shares, or None to leave them.

    Sorted by cost they are cut into a few runs, of which every second one goes backwards: a team
    that has a heavy block of one run has a light one of the next.
    """
    descending = np.argsort(-costs, kind="stable")
    orders = []
    for count in range(1, min(_MOST_RUNS, len(costs)) + 1):
        runs = np.array_split(descending, count)
        orders.append(np.concatenate([run[:: -1 if i % 2 else 1] for i, run in enumerate(runs)]))
    imbalances = [sharing.imbalance(costs[order]) for order in orders]
    best = int(np.argmin(imbalances))
    if imbalances[best] > _WORTH * sharing.imbalance(costs):
        return None
    return tuple(orders[best].tolist())


def block_costs(tables: WarpTables, shape: Shape) -> Costs:
    """What each block costs, in gathered columns."""
    first_chunks = tables.block_chunks.numpy()
    places = tables.columns.numpy().reshape(-1, shape.chunk)
    gathered = np.add.reduceat((places >= 0).sum(1), first_chunks[:-1])
    starts = tables.group_starts.numpy().reshape(-1, shape.warps)
    ends = tables.group_ends.numpy().reshape(-1, shape.warps)[first_chunks[1:] - 1]
    groups = ends - starts
    computed = (groups.sum(1) + shape.warps * groups.max(1)) / 2
    return gathered + GROUP_COST * computed


def reordered(tables: WarpTables, shape: Shape, order: Array) -> WarpTables:
    """The same blocks in another order."""
    first_chunks = tables.block_chunks.numpy()
    starts = tables.group_starts.numpy().reshape(-1, shape.warps)
    first_groups = np.append(starts[:, 0], len(tables.entries) - 1)
    chunks, groups = _of_blocks(first_chunks, order), _of_blocks(first_groups, order)
    # By how far a block's groups move.
    lengths = np.diff(first_groups)[order]
    moved = np.cumsum(lengths) - lengths - first_groups[order]
    chunk_counts = np.diff(first_chunks)[order]
    ends = tables.group_ends.numpy().reshape(-1, shape.warps)[chunks]
    return WarpTables(
        int32(np.cumsum([0, *chunk_counts])),
        tables.columns.view(-1, shape.chunk)[chunks].flatten(),
        tables.rows.view(-1, shape.warps * TILE_ROWS)[order].flatten(),
        int32((starts[order] + moved[:, None]).reshape(-1)),
        int32((ends + np.repeat(moved, chunk_counts)[:, None]).reshape(-1)),
        torch.cat([tables.entries[groups], tables.entries[-1:]]),
    )


@lru_cache(maxsize=_CACHED_ORDERS)
def _best_order_of(
    geometry: Geometry, mirrored: bool, shape: Shape, sharing: Sharing
) -> tuple[int, ...] | None:
    tables = warp_tables(geometry, mirrored, shape, torch.device("cpu"))
    return best_order(block_costs(tables, shape), sharing)


@lru_cache(maxsize=_CACHED_TABLES)
def _ordered_tables(
    geometry: Geometry,
    mirrored: bool,
    shape: Shape,
    order: tuple[int, ...],
    device: torch.device,
) -> WarpTables:
    tables = warp_tables(geometry, mirrored, shape, torch.device("cpu"))
    return reordered(tables, shape, np.array(order)).to(device)


def _of_blocks(firsts: Array, order: Array) -> Array:
    """The numbers firsts[b] … firsts[b + 1] - 1 of one block after another."""
    return np.concatenate([np.arange(firsts[block], firsts[block + 1]) for block in order])
