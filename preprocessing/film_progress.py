"""How far a command that takes minutes for each film is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ASKED_EVERY_SECONDS = 2.0
# A line at every tenth and, where there are new ones, once in so many seconds.
TENTHS = 10
TOLD_EVERY_SECONDS = 600.0


class FilmProgress:
    """Asks how many films are done and tells it, in a thread: those at work are busy for long."""

    def __init__(self, done: Callable[[], int], total: int) -> None:
        self._done, self._total = done, total
        self._at_first = self._told = 0
        self._began = self._told_at = time.monotonic()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._bar: Progress | None = None

    def __enter__(self) -> FilmProgress:
        self._at_first = self._told = self._done()
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("shots"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.add_task("", total=self._total, completed=self._at_first)
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._ending.set()
        self._thread.join()
        if kind is None:
            self._tell()
        if self._bar is not None:
            self._bar.stop()

    def _run(self) -> None:
        while not self._ending.wait(ASKED_EVERY_SECONDS):
            self._tell()

    def _tell(self) -> None:
        try:
            done = self._done()
        except OSError:
            # A file system that does not answer is told by those who need it.
            return
        if done == self._told:
            return
        left = self._left(done)
        if self._bar is not None:
            self._told = done
            self._bar.update(self._bar.task_ids[0], completed=done, description=f"{left} left")
            return
        now = time.monotonic()
        passes_a_tenth = done * TENTHS // self._total > self._told * TENTHS // self._total
        if passes_a_tenth or now - self._told_at >= TOLD_EVERY_SECONDS:
            self._told, self._told_at = done, now
            print(f"shots: {done:,} of {self._total:,} films, {left} left", flush=True)

    def _left(self, done: int) -> timedelta:
        """By what a film took since this command began."""
        each = (time.monotonic() - self._began) / max(1, done - self._at_first)
        return timedelta(seconds=round((self._total - done) * each))
