"""Progress of long work: a bar on a terminal, few lines in a log, and next to no time."""

from __future__ import annotations

import time

import pytest

from megatron_nuwa.training import progress
from megatron_nuwa.training.progress import Progress, track


class Clock:
    """Stands in for the module `time`; every look at it takes `step` seconds."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_short_work_leaves_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for total in (100, None):
        for _ in track(iter(range(100)), "rows", total=total):
            clock.now += 0.0199
    assert capsys.readouterr().out == ""


def test_a_log_gets_a_line_each_tenth(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(1003), "rows"):
        clock.now += 1 / 64
    # The first tenth is over before one wants to know of it.
    counts = ["128", "201", "301", "402", "502", "602", "703", "803", "903", "1,003"]
    assert capsys.readouterr().out.splitlines() == [f"rows: {count}/1,003" for count in counts]


def test_steps_that_are_larger_than_tenths_are_told_once(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("items", 10) as shown:
        for count in (1, 4, 4, 1):
            clock.now += 3
            shown.advance(count)
    assert capsys.readouterr().out.splitlines() == [
        *("items: 1/10", "items: 5/10", "items: 9/10", "items: 10/10")
    ]


@pytest.mark.parametrize("total", [1, 3, 9, 10, 11, 37])
def test_every_tenth_is_told_at_once_where_nothing_shall_be_quiet(
    total: int, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in track(range(total), "weights", quiet_seconds=0):
        pass
    ends = [n for n in range(1, total + 1) if n * 10 // total > (n - 1) * 10 // total]
    assert capsys.readouterr().out.splitlines() == [f"weights: {n}/{total}" for n in ends]


def test_what_was_done_before_is_not_told_again(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in track(range(4), "steps", total=10, done=6):
        clock.now += 3
    assert capsys.readouterr().out.splitlines() == [f"steps: {n}/10" for n in (7, 8, 9, 10)]


def test_an_unknown_number_is_told_each_ten_seconds_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in track(iter(range(1500)), "rows"):
        clock.now += 1 / 64
    assert capsys.readouterr().out.splitlines() == ["rows: 640", "rows: 1,280", "rows: 1,500"]


def test_an_unknown_number_is_told_at_the_end_of_work_of_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in track(iter(range(300)), "rows"):
        clock.now += 0.01
    assert capsys.readouterr().out == "rows: 300\n"


def test_work_that_fails_does_not_say_that_it_is_done(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with Progress("rows") as shown:
            clock.now += 5
            shown.advance(7)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("total", "shown"), [(3, "3/3"), (None, "3/?")])
def test_a_terminal_gets_a_bar(
    total: int | None,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track(iter("abc"), "letters", total=total)) == ["a", "b", "c"]
    told = capsys.readouterr()
    assert told.out == ""
    assert "letters" in told.err
    assert "━" in told.err
    assert shown in told.err


@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_costs_next_to_no_time(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    steps, costs = 20_000, []
    for _ in range(5):
        with Progress("rows", None if terminal else steps) as shown:
            began = time.thread_time()
            for _ in range(steps):
                shown.advance()
            costs.append((time.thread_time() - began) / steps)
    # A bar that is drawn anew at each step takes a hundred times as long.
    assert min(costs) < 4e-6
