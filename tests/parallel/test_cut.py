"""The cut of a pipeline into stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megatron_nuwa.grid import Grid
from megatron_nuwa.models.flops import unit_flops, unit_names
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.parallel.cut import cut, stage_table


def all_cuts(units: int, stages: int) -> Iterator[list[int]]:
    for inner in combinations(range(1, units), stages - 1):
        yield [0, *inner, units]


def worth(costs: Sequence[float], bounds: Sequence[int]) -> tuple[float, float]:
    sums = [sum(costs[start:end]) for start, end in pairwise(bounds)]
    return max(sums), sum(cost**2 for cost in sums)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_no_cut_of_all_is_better(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    bounds = cut(costs, stages)
    assert bounds in list(all_cuts(len(costs), stages))
    best = min(worth(costs, other) for other in all_cuts(len(costs), stages))
    assert worth(costs, bounds) == best


@given(st.lists(st.floats(0, 1e3), min_size=3, max_size=7))
def test_measured_times_are_cut_as_well(costs: list[float]) -> None:
    best = min(worth(costs, other)[0] for other in all_cuts(len(costs), 3))
    assert worth(costs, cut(costs, 3))[0] == pytest.approx(best)


@pytest.mark.parametrize(
    ("costs", "stages", "message"),
    [
        ([1, 2], 3, "1 … 2"),
        ([1, 2], 0, "1 … 2"),
        ([1, -1], 1, "not negative"),
        ([1, float("nan")], 1, "finite"),
    ],
)
def test_what_cannot_be_cut_is_refused(costs: list[float], stages: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(costs, stages)


def test_the_paper_model_is_cut_by_work_not_by_parameters() -> None:
    """The twelve encoder layers read 77 tokens and the decoder 4,410: they share one stage."""
    config = NuwaConfig()
    costs = unit_flops(config, "text", config.text_grid, Grid(21, 21, 10))
    names = unit_names(config)
    bounds = cut(costs, 4)
    assert names[bounds[1]] in {f"decoder.{layer}" for layer in (5, 6)}
    largest, _ = worth(costs, bounds)
    assert largest < 1.1 * sum(costs) / 4
    console = Console(width=120)
    with console.capture() as shown:
        console.print(stage_table(names, costs, bounds))
    text = shown.get()
    assert f"embedding … {names[bounds[1] - 1]}" in text
    assert "head" in text
    assert f"{sum(costs[: bounds[1]]) / 1e9:,.1f}" in text
