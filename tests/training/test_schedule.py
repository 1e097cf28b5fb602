"""Warm-up over 5 % of the steps, then the named decay."""

from __future__ import annotations

import pytest

from megatron_nuwa.training.schedule import ScheduleSettings, learning_rate


def test_paper_schedule_warms_up_over_five_percent_of_fifty_million_steps() -> None:
    schedule = ScheduleSettings()
    assert schedule.warmup_steps == 2_500_000
    assert learning_rate(0, 1e-3, schedule) == pytest.approx(1e-3 / 2_500_000)
    assert learning_rate(1_249_999, 1e-3, schedule) == pytest.approx(5e-4)
    assert learning_rate(2_499_999, 1e-3, schedule) == 1e-3
    assert learning_rate(49_999_999, 1e-3, schedule) == 1e-3


@pytest.mark.parametrize(
    ("decay", "quarters"),
    [("constant", (1.0, 1.0)), ("linear", (0.775, 0.325)), ("cosine", (0.86819805, 0.23180195))],
)
def test_decays_begin_where_warm_up_ends(decay: str, quarters: tuple[float, float]) -> None:
    schedule = ScheduleSettings(steps=1000, warmup_fraction=0.2, decay=decay, final_fraction=0.1)
    assert learning_rate(199, 1.0, schedule) == learning_rate(200, 1.0, schedule) == 1.0
    found = [learning_rate(step, 1.0, schedule) for step in (400, 800)]
    assert found == pytest.approx(quarters)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_a_schedule_may_be_all_warm_up(decay: str) -> None:
    schedule = ScheduleSettings(steps=10, warmup_fraction=1, decay=decay)
    assert [learning_rate(step, 1.0, schedule) for step in (0, 9, 10)] == [0.1, 1.0, 1.0]


@pytest.mark.parametrize(("decay", "halfway"), [("linear", 0.55), ("cosine", 0.55)])
def test_decays_end_at_the_final_fraction(decay: str, halfway: float) -> None:
    schedule = ScheduleSettings(steps=1000, warmup_fraction=0, decay=decay, final_fraction=0.1)
    assert learning_rate(0, 1.0, schedule) == 1.0
    assert learning_rate(500, 1.0, schedule) == pytest.approx(halfway)
    assert learning_rate(1000, 1.0, schedule) == pytest.approx(0.1)
    assert learning_rate(2000, 1.0, schedule) == pytest.approx(0.1)
    rates = [learning_rate(step, 1.0, schedule) for step in range(1000)]
    assert rates == sorted(rates, reverse=True)


def test_the_end_of_warm_up_is_told_while_it_lies_ahead() -> None:
    schedule = ScheduleSettings(steps=1000, warmup_fraction=0.1)
    assert schedule.in_words(99) == "1000 steps in all; warm-up ends after step 100"
    assert schedule.in_words(100) == "1000 steps in all"
