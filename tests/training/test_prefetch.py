"""Batches come one step ahead, in order, whatever the number of steps."""

from __future__ import annotations

import threading
from itertools import islice

import pytest

from megatron_nuwa.training.prefetch import prefetched


class Waits:
    """Counts the waits."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def add_wait(self, seconds: float) -> None:
        self.seconds.append(seconds)


def test_steps_come_in_order_one_read_ahead_and_each_wait_is_told() -> None:
    clock, begun, other = Waits(), [threading.Event() for _ in range(4)], []

    def read(step: int) -> int:
        begun[step - 5].set()
        other.append(threading.current_thread() is not threading.main_thread())
        return 10 * step

    for number, batch in enumerate(prefetched(read, range(5, 9), clock)):
        assert batch == 10 * (5 + number)
        assert number == 3 or begun[number + 1].wait(10)
    assert (other, len(clock.seconds)) == ([True] * 4, 4)
    assert list(prefetched(read, range(0), clock)) == []


def test_a_long_schedule_takes_no_memory() -> None:
    """As a list it would be refused at once."""
    assert [*islice(prefetched(str, range(1 << 62), Waits()), 3)] == ["0", "1", "2"]


def test_an_error_appears_at_its_step() -> None:
    batches = prefetched(lambda step: 1 // (2 - step), range(4), Waits())
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)
