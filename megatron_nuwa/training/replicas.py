"""Weights that several processes hold alike, compared now and then.

Norms, biases and positions lie on every process of a tensor group, a tied table on two stages. Each
takes its own optimizer steps, with gradients that are summed among other processes: a GPU or a link
that computes wrongly would part them, and nothing else compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import vector_norm

from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.processes import Processes

# As much as if every number of a weight of 64 in bf16 were rounded at random, the one way or the
# other, which can come of the order in which a GPU adds up; less in a larger one.
_ROUNDING = 5e-4


class Difference(NamedTuple):
    """The weight that differs most in a group of processes, relative to its size.

    By infinity where it is not finite on one of them.
    """

    relative: float
    name: str
    ranks: list[int]

    def __str__(self) -> str:
        ranks = " and ".join(map(str, self.ranks))
        if self.relative == math.inf:
            return f"{self.name} is not finite on one of the ranks {ranks}"
        return f"{self.name} differs by {self.relative:.1e} of its size among ranks {ranks}"


def warn_where_replicas_differ(engine: Engine, processes: Processes, step: int) -> None:
    """Say in one sentence which weight has come apart; every process must call it."""
    differences = [
        largest_difference(weights, group, processes.device)
        for group, weights in engine.replicated_weights()
    ]
    worst = max(differences, default=Difference(0.0, "", []))
    found = max(processes.gather(worst), key=lambda difference: difference.relative)
    if found.relative > _ROUNDING and processes.is_first:
        print(
            f"warning: after step {step} {found}, which should hold it alike: a GPU or a link may "
            "compute wrongly, and the checkpoints from here on may be no good",
            flush=True,
        )


@torch.no_grad()
def largest_difference(
    weights: Mapping[str, Tensor], group: dist.ProcessGroup, device: torch.device
) -> Difference:
    """By sums and norms in fp64, in one collective on `device`; all of the group call it."""
    # Offloaded weights lie on the CPU.
    sums = [
        torch.stack([w.sum(dtype=torch.float64), vector_norm(w, dtype=torch.float64)]).to(device)
        for w in weights.values()
    ]
    if not sums:
        return Difference(0.0, "", [])
    own = torch.stack(sums)
    # A maximum may pass over what is no number.
    broken = (~own.isfinite()).to(own.dtype)
    extremes = torch.stack([own.nan_to_num(0, 0, 0), -own.nan_to_num(0, 0, 0), broken])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    highest, lowest, is_broken = extremes[0].tolist(), (-extremes[1]).tolist(), extremes[2].any(1)
    found = [
        (math.inf if bad else _relative(high, low, weight.numel()), name)
        for high, low, bad, (name, weight) in zip(
            highest, lowest, is_broken.tolist(), weights.items(), strict=True
        )
    ]
    return Difference(*max(found), dist.get_process_group_ranks(group))


def _relative(high: Sequence[float], low: Sequence[float], count: int) -> float:
    """Difference of the mean, or of the root of the mean square, over the latter."""
    (highest_sum, norm), (lowest_sum, lowest_norm) = high, low
    if not norm:
        return 0.0
    return max((highest_sum - lowest_sum) / math.sqrt(count), norm - lowest_norm) / norm
