"""The farm's progress: a live table on a terminal, plain lines in a log, TensorBoard scalars.

Rates are those of the last minute: averages over hours would hide that the work stands still.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from preprocessing.event_file import EventFile
from preprocessing.figures import Figures, History, Span

SHOWN_EVERY_SECONDS = 0.25
SCALARS_EVERY_SECONDS = 10.0
# The rate of so short a time says nothing.
FEWEST_SCALAR_SECONDS = 1.0
LINES_IN_A_LOG = 10
LINE_EVERY_SECONDS = 600.0
NOTED_EVERY_SECONDS = 1.0
RECENT_SECONDS = 60.0
# The time left is told by a longer past, so that it does not leap.
LEFT_SECONDS = 300.0


class Watch:
    """Adds up the ranks' figures and shows them; only the first rank has one."""

    def __init__(
        self,
        total: int,
        frames: int,
        tensorboard: Path,
        roles: str = "",
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`roles` says which ranks encode and which decode; `clock` counts seconds.

        `done` items of the corpus, beside the `total` ones, are there from earlier runs.
        """
        self.figures = Figures()
        self.roles = roles
        self._total = total
        self._done = done
        self._frames = frames
        self._folder = tensorboard
        self._clock = clock
        self._began = clock()
        self._last_shown = self._last_line = self._last_scalars = self._began
        self._written = Figures()
        self._history = History(self._began, LEFT_SECONDS, NOTED_EVERY_SECONDS)
        self._told = 0
        self._scalars: EventFile | None = None
        self._has_lost_scalars = self._has_rates = False
        self._live: Live | None = None

    def __enter__(self) -> Watch:
        console = Console(stderr=True)
        if console.is_terminal:
            self._live = Live(self._table(), console=console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._show()
            self._write_scalars()
        if self._live is not None:
            self._live.stop()
        self._close_scalars()

    def add(self, figures: Figures) -> None:
        """Add what a rank has done since it told last."""
        self.figures.add(figures)

    def tick(self) -> None:
        """Show how far the work is, where it is time to."""
        now = self._clock()
        self._history.note(now, self.figures)
        if now - self._last_shown >= SHOWN_EVERY_SECONDS:
            self._last_shown = now
            self._show()
        if now - self._last_scalars >= SCALARS_EVERY_SECONDS:
            self._write_scalars()

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self._began

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        tenth = self.figures.items * LINES_IN_A_LOG // self._total if self._total else 0
        now = self._clock()
        # Also where no tenth is reached, for then one wants to know.
        if tenth > self._told or now - self._last_line >= LINE_EVERY_SECONDS:
            self._told, self._last_line = tenth, now
            recent = self._recent(RECENT_SECONDS)
            print(
                f"tokenize: {self.figures.items}/{self._total}, "
                f"{recent.rate(recent.figures.items):,.1f} items/s, {self.figures.failed} failed, "
                f"{self._left()} left",
                flush=True,
            )

    def _recent(self, seconds: float) -> Span:
        return self._history.span(seconds, self._clock(), self.figures)

    def _table(self) -> Table:
        figures, recent = self.figures, self._recent(RECENT_SECONDS)
        new = recent.figures
        table = Table(
            title="tokenize",
            caption="speed, times and queue over the last minute",
            show_header=False,
            min_width=60,
        )
        table.add_column(style="bold")
        table.add_column(ratio=1)
        if self.roles:
            table.add_row("ranks", self.roles)
        table.add_row("done", ProgressBar(total=max(1, self._total), completed=figures.items))
        table.add_row("items", f"{figures.items:,} of {self._total:,}, {figures.shards:,} shards")
        unit = "clips" if self._frames > 1 else "images"
        table.add_row(
            "speed",
            f"{recent.rate(new.items):,.1f} items/s, {recent.rate(new.encoded):,.1f} {unit}/s, "
            f"{recent.rate(new.frames):,.1f} frames/s",
        )
        table.add_row(
            "decode · encode · write",
            f"{_milliseconds(new.decode_seconds, new.items)} · "
            f"{_milliseconds(new.encode_seconds, new.items)} · "
            f"{_milliseconds(new.write_seconds, new.items)} an item",
        )
        table.add_row("queue", f"{new.fill:.0%} full, encoders starved {new.starved:.0%}")
        table.add_row("failed", f"{figures.failed:,}, and {figures.left_out:,} left out by filters")
        whole = Span(self.seconds, figures)
        table.add_row(
            "since the start",
            f"{timedelta(seconds=round(whole.seconds))}, {whole.rate(figures.items):,.1f} items/s",
        )
        table.add_row("time left", self._left())
        return table

    def _left(self) -> str:
        rest = self._total - self.figures.items
        recent = self._recent(LEFT_SECONDS)
        if rest and not recent.figures.items:
            return "?"
        rate = recent.rate(max(1, recent.figures.items))
        return str(timedelta(seconds=round(rest / rate)))

    def _write_scalars(self) -> None:
        """Write the figures for TensorBoard: a disk that refuses costs them, and not the farm."""
        try:
            if self._scalars is None:
                self._scalars = EventFile(self._folder)
            # TensorBoard forgets all that it has seen at steps from which a later file begins.
            self._scalars.write(self._values(), self._done + self.figures.items)
        except OSError as error:
            # What is half written would end the reading of all that follows in the same file.
            self._close_scalars()
            self._last_scalars = self._clock()
            if not self._has_lost_scalars:
                reason = error.strerror or error
                print(f"warning: {self._folder}: figures are lost ({reason})", flush=True)
            self._has_lost_scalars = True

    def _close_scalars(self) -> None:
        if self._scalars is not None:
            self._scalars.close()
        self._scalars = None

    def _values(self) -> dict[str, float]:
        """The totals, and the rates since the last time."""
        now = self._clock()
        span = Span(now - self._last_scalars, self.figures.since(self._written))
        # A sum of shares says nothing by itself, and has the name of their average.
        totals = {name: value for name, value in vars(self.figures).items() if name != "queue_fill"}
        values = {f"farm/{name}": float(value) for name, value in totals.items()}
        if not self._has_rates or span.seconds >= FEWEST_SCALAR_SECONDS:
            values |= {
                "farm/items_per_second": span.rate(span.figures.items),
                "farm/frames_per_second": span.rate(span.figures.frames),
                "farm/queue_fill": span.figures.fill,
                "farm/encoders_starved": span.figures.starved,
            }
            self._last_scalars, self._written = now, replace(self.figures)
            self._has_rates = True
        return values


def _milliseconds(seconds: float, count: int) -> str:
    return f"{seconds / count * 1e3:.1f} ms" if count else "–"
