"""Progress that a person can follow: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

_LINES_IN_A_LOG = 10


def track(
    items: Iterable[T], description: str, *, total: int | None = None, done: int = 0
) -> Iterator[T]:
    """Yield `items` while showing how far along they are; `done` of `total` were done before.

    Lines printed meanwhile appear above the bar. In a log about ten lines tell the same.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _lines(items, description, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)


def _lines(items: Iterable[T], description: str, total: int | None, done: int) -> Iterator[T]:
    told = done * _LINES_IN_A_LOG // total if total else 0
    for number, item in enumerate(items, start=done + 1):
        yield item
        tenth = number * _LINES_IN_A_LOG // total if total else 0
        if tenth > told:
            told = tenth
            print(f"{description}: {number}/{total}", flush=True)
