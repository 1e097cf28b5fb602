"""Reading the next step's batches while this step computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Protocol, TypeVar

T = TypeVar("T")


class WaitClock(Protocol):
    """Whoever wants to know how long the consumer waited for data."""

    def add_wait(self, seconds: float) -> None:
        """Note a wait."""


def prefetched(read: Callable[[int], T], steps: Sequence[int], clock: WaitClock) -> Iterator[T]:
    """`read(step)` for every step in order, one step ahead in a thread.

    An exception of `read` appears at the step that it belongs to.
    """
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(read, steps[0]) if steps else None
        # Not as a list: 50 million steps would take gigabytes of every process.
        for following in chain(steps[1:], [None]):
            if coming is None:
                return
            start = time.perf_counter()
            batch = coming.result()
            clock.add_wait(time.perf_counter() - start)
            coming = None if following is None else reader.submit(read, following)
            yield batch
