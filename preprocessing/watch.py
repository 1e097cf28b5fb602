"""The farm's progress: a live table on a terminal, plain lines in a log, TensorBoard scalars."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from preprocessing.event_file import EventFile
from preprocessing.figures import Figures

SHOWN_EVERY_SECONDS = 0.25
SCALARS_EVERY_SECONDS = 10.0
LINES_IN_A_LOG = 10


class Watch:
    """Adds up the ranks' figures and shows them; only the first rank has one."""

    def __init__(self, total: int, frames: int, tensorboard: Path, roles: str = "") -> None:
        """`roles` says which ranks encode and which decode."""
        self.figures = Figures()
        self.roles = roles
        self._total = total
        self._frames = frames
        self._folder = tensorboard
        self._began = time.monotonic()
        self._last_shown = self._last_scalars = self._began
        self._told = 0
        self._scalars: EventFile | None = None
        self._has_lost_scalars = False
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
        now = time.monotonic()
        if now - self._last_shown >= SHOWN_EVERY_SECONDS:
            self._last_shown = now
            self._show()
        if now - self._last_scalars >= SCALARS_EVERY_SECONDS:
            self._last_scalars = now
            self._write_scalars()

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._began

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        tenth = self.figures.items * LINES_IN_A_LOG // self._total if self._total else 0
        if tenth > self._told:
            self._told = tenth
            print(
                f"tokenize: {self.figures.items}/{self._total}, "
                f"{self._rate(self.figures.items)} items/s, {self.figures.failed} failed, "
                f"{self._left()} left",
                flush=True,
            )

    def _table(self) -> Table:
        figures = self.figures
        table = Table(title="tokenize", show_header=False, min_width=60)
        table.add_column(style="bold")
        table.add_column(ratio=1)
        if self.roles:
            table.add_row("ranks", self.roles)
        table.add_row("done", ProgressBar(total=max(1, self._total), completed=figures.items))
        table.add_row("items", f"{figures.items:,} of {self._total:,}, {figures.shards:,} shards")
        unit = "clips" if self._frames > 1 else "images"
        table.add_row(
            "speed",
            f"{self._rate(figures.items)} items/s, "
            f"{self._rate(figures.items - figures.failed - figures.left_out)} {unit}/s, "
            f"{self._rate(figures.frames)} frames/s",
        )
        table.add_row(
            "decode · encode · write",
            f"{_milliseconds(figures.decode_seconds, figures.items)} · "
            f"{_milliseconds(figures.encode_seconds, figures.items)} · "
            f"{_milliseconds(figures.write_seconds, figures.items)} an item",
        )
        table.add_row("queue", f"{self._fill():.0%} full, encoders starved {self._starved():.0%}")
        table.add_row("failed", f"{figures.failed:,}, and {figures.left_out:,} left out by filters")
        table.add_row("time left", self._left())
        return table

    def _rate(self, count: int) -> str:
        return f"{count / max(self.seconds, 1e-9):,.1f}"

    def _left(self) -> str:
        if not self.figures.items:
            return "?"
        rest = (self._total - self.figures.items) * self.seconds / self.figures.items
        return str(timedelta(seconds=round(rest)))

    def _fill(self) -> float:
        return self.figures.queue_fill / max(1, self.figures.queue_samples)

    def _starved(self) -> float:
        """Share of the encode ranks' time in which there was nothing to encode."""
        busy = self.figures.encode_seconds + self.figures.write_seconds
        return self.figures.starved_seconds / max(1e-9, self.figures.starved_seconds + busy)

    def _write_scalars(self) -> None:
        """Write the figures for TensorBoard: a disk that refuses costs them, and not the farm."""
        try:
            if self._scalars is None:
                self._scalars = EventFile(self._folder)
            self._scalars.write(self._values(), self.figures.items)
        except OSError as error:
            # What is half written would end the reading of all that follows in the same file.
            self._close_scalars()
            if not self._has_lost_scalars:
                reason = error.strerror or error
                print(f"warning: {self._folder}: figures are lost ({reason})", flush=True)
            self._has_lost_scalars = True

    def _close_scalars(self) -> None:
        if self._scalars is not None:
            self._scalars.close()
        self._scalars = None

    def _values(self) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        return {
            "farm/items_per_second": self.figures.items / seconds,
            "farm/frames_per_second": self.figures.frames / seconds,
            "farm/queue_fill": self._fill(),
            "farm/encoders_starved": self._starved(),
            **{f"farm/{name}": float(value) for name, value in asdict(self.figures).items()},
        }


def _milliseconds(seconds: float, count: int) -> str:
    return f"{seconds / count * 1e3:.1f} ms" if count else "–"
