"""What the farm counts while it works."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass
class Figures:
    """Sums over ranks and time; seconds are those of all threads together.

    `starved_seconds` is how long encode ranks had nothing to encode, `queue_seconds` how long there
    were queues, and `queue_fill` the sum of these seconds, each times the share that was full.
    """

    items: int = 0
    failed: int = 0
    left_out: int = 0
    frames: int = 0
    shards: int = 0
    batches: int = 0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    starved_seconds: float = 0.0
    queue_seconds: float = 0.0
    queue_fill: float = 0.0

    @property
    def encoded(self) -> int:
        """Items that are neither broken nor left out."""
        return self.items - self.failed - self.left_out

    @property
    def fill(self) -> float:
        """How full the queues were, on average: 0 to 1."""
        return self.queue_fill / max(1e-9, self.queue_seconds)

    @property
    def starved(self) -> float:
        """Share of the encode ranks' time in which there was nothing to encode."""
        busy = self.encode_seconds + self.write_seconds
        return self.starved_seconds / max(1e-9, self.starved_seconds + busy)

    def add(self, other: Figures) -> None:
        """Add another rank's figures, or a later time's."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def since(self, earlier: Figures) -> Figures:
        """What has been added since the figures were the earlier ones."""
        before = vars(earlier)
        return Figures(**{name: value - before[name] for name, value in vars(self).items()})


class Span(NamedTuple):
    """What was counted in so many seconds."""

    seconds: float
    figures: Figures

    def rate(self, count: int) -> float:
        """A count of these figures by the second."""
        return count / max(self.seconds, 1e-9)


class History:
    """Figures as they were in the last minutes, by which one sees what is going on now."""

    def __init__(self, now: float, longest_seconds: float, every_seconds: float) -> None:
        """It begins at `now` with nothing, and is noted at most so often."""
        self._longest, self._every = longest_seconds, every_seconds
        self._notes: deque[tuple[float, Figures]] = deque([(now, Figures())])

    def note(self, now: float, figures: Figures) -> None:
        """Remember the figures, unless it is too soon after the last time."""
        if now - self._notes[-1][0] < self._every:
            return
        self._notes.append((now, replace(figures)))
        # One note must lie before the longest span's beginning.
        while len(self._notes) > 1 and self._notes[1][0] <= now - self._longest:
            self._notes.popleft()

    def span(self, seconds: float, now: float, figures: Figures) -> Span:
        """The last so many seconds, or all time where that is less."""
        notes = reversed(self._notes)
        began, then = next((n for n in notes if n[0] <= now - seconds), self._notes[0])
        return Span(now - began, figures.since(then))
