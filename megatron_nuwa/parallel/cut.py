"""Cutting a chain of units into pipeline stages that cost as nearly the same as can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from rich.table import Table


def cut(costs: Sequence[float], stages: int) -> list[int]:
    """Bounds of consecutive stages: stage s holds the units `bounds[s]` … `bounds[s + 1] - 1`.

    No stage is empty. The largest stage's cost is as small as any cut can make it; among such
    cuts the sum of squared stage costs is least.

    Raises `ValueError` for fewer units than stages, and for a cost below 0 or not finite.
    """
    units = len(costs)
    if not 1 <= stages <= units:
        raise ValueError(f"stages must be in 1 … {units}, the number of units, not {stages}")
    if any(not math.isfinite(cost) or cost < 0 for cost in costs):
        raise ValueError("costs must be finite and not negative")
    sums = [0, *accumulate(costs)]
    smallest, _ = _best_chain(sums, stages, lambda cost: cost, max)
    _, bounds = _best_chain(
        sums,
        stages,
        lambda cost: cost * cost if cost <= smallest else math.inf,
        lambda total, more: total + more,
    )
    return bounds


def _best_chain(
    sums: Sequence[float],
    stages: int,
    price: Callable[[float], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The cut whose joined stage prices are least, by dynamic programming over the last stage."""
    units = len(sums) - 1
    best = [0.0] + [math.inf] * units
    starts: list[list[int]] = []
    for stage in range(1, stages + 1):
        ends = range(stage, units - stages + stage + 1)
        following, start_of = [math.inf] * (units + 1), [stage - 1] * (units + 1)
        for end in ends:
            for start in range(stage - 1, end):
                total = join(best[start], price(sums[end] - sums[start]))
                if total < following[end]:
                    following[end], start_of[end] = total, start
        best = following
        starts.append(start_of)
    bounds = [units]
    for start_of in reversed(starts):
        bounds.append(start_of[bounds[-1]])
    return best[units], bounds[::-1]


# What costs of each kind are shown in.
_SHOWN = {
    "flops": ("GFLOPs a step", 1e-9),
    "measured": ("ms a step", 1e3),
    "uniform": ("layers", 1),
}


def stage_table(
    names: Sequence[str], costs: Sequence[float], bounds: Sequence[int], by: str = "flops"
) -> Table:
    """The cut as a table to print.

    `costs` are each unit's FLOPs or seconds a step, or its number of layers, as `by` says:
    "flops", "measured" or "uniform".
    """
    heading, factor = _SHOWN[by]
    sums = [sum(costs[start:end]) for start, end in pairwise(bounds)]
    total = sum(sums)
    mean = total / len(sums)
    table = Table(title="Pipeline stages")
    table.add_column("stage", justify="right")
    table.add_column("units")
    for title in (heading, "share", "from the mean"):
        table.add_column(title, justify="right")
    for stage, ((start, end), cost) in enumerate(zip(pairwise(bounds), sums, strict=True)):
        units = names[start] if end - start == 1 else f"{names[start]} … {names[end - 1]}"
        share = cost / total if total else 0.0
        away = cost / mean - 1 if mean else 0.0
        table.add_row(str(stage), units, f"{cost * factor:,.1f}", f"{share:.1%}", f"{away:+.1%}")
    return table
