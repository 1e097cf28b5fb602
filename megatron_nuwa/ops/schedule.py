"""Which items each team of warps works at, so that all of them are done at about the same time.

An item is a block of a table for one head of one batch item; items are numbered heads first, then
blocks, then batch items. Where blocks differ, as in causal windows, teams that took every so many
items would come out unlike: on 132 multiprocessors, with 20 heads, the slowest had a fifth more
than the mean. So each item goes to the team that is free first, by what the tables say of its cost.
"""

from __future__ import annotations

import heapq
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.ops.tilings import GROUP_COST
from megatron_nuwa.ops.warp_tables import Shape, WarpTables, int32, warp_tables

# So many rounds are handed out with the dearest items first, lest one come at the very end. Before
# them items keep their order, in which neighbours share columns and lie side by side in memory.
_LAST_ROUNDS = 4
# A kernel asks for the next item while it works at one, and once more when none is left.
_SPARE_ROUNDS = 2
_CACHED_SCHEDULES = 256

Array = npt.NDArray[np.int64]
Costs = npt.NDArray[np.float64]


class Sharing(NamedTuple):
    """Among how many teams the items of a call are shared out."""

    batch: int
    heads: int
    teams: int

    def items(self, of_blocks: Costs) -> Costs:
        """What each item costs, where each block costs `of_blocks`."""
        return np.tile(np.repeat(of_blocks, self.heads), self.batch)


@lru_cache(maxsize=_CACHED_SCHEDULES)
def schedule(
    geometry: Geometry, mirrored: bool, shape: Shape, sharing: Sharing, device: torch.device
) -> Tensor:
    """The item of each team in each round, int32 (rounds + 2, teams), -1 = none; made once.

    The mirrored pass begins with the last items: theirs is what the pass before it, which reads the
    same tensors, has left in the cache.
    """
    tables = warp_tables(geometry, mirrored, shape, torch.device("cpu"))
    costs = sharing.items(block_costs(tables, shape))
    if mirrored:
        rounds = shared_out(costs[::-1], sharing.teams)
        rounds = np.where(rounds < 0, rounds, len(costs) - 1 - rounds)
    else:
        rounds = shared_out(costs, sharing.teams)
    spare = np.full((_SPARE_ROUNDS, sharing.teams), -1)
    return int32(np.concatenate([rounds, spare])).to(device)


def shared_out(costs: Costs, teams: int) -> Array:
    """Items of these costs, (rounds, teams), each to the team that is free first; -1 = none."""
    last = max(len(costs) - _LAST_ROUNDS * teams, 0)
    dearest_first = last + np.argsort(-costs[last:], kind="stable")
    free = [(0.0, team) for team in range(teams)]
    of_teams: list[list[int]] = [[] for _ in range(teams)]
    for item in (*range(last), *dearest_first.tolist()):
        begin, team = free[0]
        heapq.heapreplace(free, (begin + float(costs[item]), team))
        of_teams[team].append(item)
    rounds = np.full((max(map(len, of_teams)), teams), -1)
    for team, items in enumerate(of_teams):
        rounds[: len(items), team] = items
    return rounds


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
