"""Progress that a person can follow: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sized
from types import TracebackType
from typing import TypeVar

from rich import progress
from rich.console import Console

T = TypeVar("T")

# Work of so little time leaves no line in a log.
QUIET_SECONDS = 2.0
_LINES_IN_A_LOG = 10
# Where nobody knows how much there is, a line in a log comes so often.
_LINE_SECONDS = 10.0
_BAR_SECONDS = 0.1


class Progress:
    """A count that is shown while it grows, on the way from `done` to `total`, if that is known.

    Lines printed meanwhile appear above the bar. In a log about ten lines tell the same, or one
    each ten seconds where the total is unknown, after `quiet_seconds`. To advance by one costs a
    fraction of a microsecond.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        done: int = 0,
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        self._description, self._total, self._count = description, total, done
        self._quiet_seconds = quiet_seconds
        self._began = time.monotonic()
        self._told = done
        self._next_count = done + 1
        self._next_time = self._began
        self._bar: progress.Progress | None = None

    def __enter__(self) -> Progress:
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=console,
            )
            self._bar.add_task(self._description, total=self._total, completed=self._count)
            self._bar.start()
        elif self._total:
            self._next_count = self._end_of_tenth()
        else:
            self._next_time = self._began + max(_LINE_SECONDS, self._quiet_seconds)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._count)
            self._bar.stop()
        elif kind is None and self._told < self._count and not self._total:
            self._tell(time.monotonic())

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self._count += count
        if self._count < self._next_count:
            return
        now = time.monotonic()
        if now < self._next_time:
            return
        if self._bar is not None:
            self._next_time = now + _BAR_SECONDS
            self._bar.update(self._bar.task_ids[0], completed=self._count)
        else:
            self._tell(now)

    def _tell(self, now: float) -> None:
        if now - self._began < self._quiet_seconds:
            return
        self._told = self._count
        if self._total:
            self._next_count = self._end_of_tenth()
            print(f"{self._description}: {self._count:,}/{self._total:,}", flush=True)
        else:
            self._next_time = now + _LINE_SECONDS
            print(f"{self._description}: {self._count:,}", flush=True)

    def _end_of_tenth(self) -> int:
        """The count with which the tenth that the count lies in is complete."""
        assert self._total
        tenth = self._count * _LINES_IN_A_LOG // self._total
        return -(-(tenth + 1) * self._total // _LINES_IN_A_LOG)


def track(
    items: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    done: int = 0,
    quiet_seconds: float = QUIET_SECONDS,
) -> Generator[T, None, None]:
    """Yield `items` while showing how far along they are, as `Progress` does.

    `done` of `total` were done before.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(description, total, done, quiet_seconds) as shown:
        for item in items:
            yield item
            shown.advance()
