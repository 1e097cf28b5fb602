"""Shows how far the stages are: a live table on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from launch.workflow.stage import Stage

_PLAIN_SECONDS = 15.0


class Display:
    """Progress of the stages; `tail` gives the last lines of a log."""

    def __init__(self, console: Console, tail: Callable[[Path, int], list[str]]) -> None:
        self._console = console
        self._tail = tail
        self._stages: Sequence[Stage] = ()
        self._notes: dict[str, str] = {}
        self._current: Stage | None = None
        self._log = Path()
        self._began = 0.0
        self._told_at = 0.0
        self._told = ""
        self._spinner = Spinner("dots", style="cyan")
        self._live = (
            Live(console=console, get_renderable=self._render, refresh_per_second=4)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *reason: object) -> None:
        if self._live:
            self._live.stop()

    def begin(self, stages: Sequence[Stage]) -> None:
        """Name all the stages that will be shown."""
        self._stages = stages

    def skip(self, stage: Stage, seconds: float) -> None:
        """A stage was done before, in `seconds`."""
        self._note(stage, f"done before, in {duration(seconds)}")

    def start(self, stage: Stage, log: Path) -> None:
        """A stage begins and writes to `log`."""
        self._current, self._log, self._began = stage, log, time.monotonic()
        self._told_at, self._told = self._began, ""
        if not self._live:
            self._console.print(f"{self._place(stage)} {stage.title} …", highlight=False)

    def refresh(self) -> None:
        """A good moment to tell what the current stage last said."""
        now = time.monotonic()
        if self._live or self._current is None or now - self._told_at < _PLAIN_SECONDS:
            return
        line = self._last_line()
        if line != self._told:
            # Logs may hold square brackets, which rich would read as markup.
            text = Text(f"        {duration(now - self._began)}  {line}")
            self._console.print(text, overflow="ellipsis", no_wrap=True)
            self._told_at, self._told = now, line

    def finish(self, stage: Stage, seconds: float, peak_memory_bytes: int) -> None:
        """A stage has succeeded."""
        memory = peak_memory_bytes / 2**30
        self._current = None
        self._note(stage, f"done in {duration(seconds)}, at most {memory:.1f} GiB of memory")

    def _note(self, stage: Stage, note: str) -> None:
        self._notes[stage.name] = note
        if not self._live:
            self._console.print(f"{self._place(stage)} {note}", highlight=False)

    def _place(self, stage: Stage) -> str:
        return f"({self._stages.index(stage) + 1}/{len(self._stages)}) {stage.name}:"

    def _last_line(self) -> str:
        return "".join(self._tail(self._log, 1))

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        names = max((len(stage.name) for stage in self._stages), default=0)
        table.add_column(no_wrap=True, min_width=names)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for stage in self._stages:
            if stage.name in self._notes:
                table.add_row("[green]✓", stage.name, Text(self._notes[stage.name], "dim"))
            elif stage is self._current:
                elapsed = duration(time.monotonic() - self._began)
                title = f"[cyan]{elapsed}[/]  {stage.title}"
                table.add_row(self._spinner, f"[bold]{stage.name}", title)
            else:
                table.add_row("[dim]·", f"[dim]{stage.name}", Text(stage.title, "dim"))
        if self._current is None:
            return table
        line = Text(f"    {self._last_line()}", "dim", no_wrap=True, overflow="ellipsis")
        return Group(table, line)


def duration(seconds: float) -> str:
    """Seconds as people write them: 8.3 s, 2 min 05 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
