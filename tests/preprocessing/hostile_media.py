"""Broken and hostile media, each with what must become of it.

`hostile_images` and `hostile_clips` write them; `Hostile.check` says whether an outcome is right.
The rules that the expected frames follow are those of `SIDE`, `FRAMES` and `RATE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SIDE = 32
FRAMES = 3
RATE = 5.0

Colour = tuple[int, int, int]
RED, GREEN, BLUE, WHITE, BLACK = (
    *((255, 0, 0), (0, 255, 0), (0, 0, 255)),
    *((255, 255, 255), (0, 0, 0)),
)


@dataclass(frozen=True)
class Hostile:
    """One item: `reason` is a pattern of the recorded one, `pixels` tells whether frames are right.

    With both, either will do: the file is damaged in a way that some releases of a library see.
    """

    name: str
    reason: str | None = None
    pixels: Callable[[np.ndarray], bool] | None = None
    row: dict[str, object] = field(default_factory=dict)

    def complaint(self, folder: Path, outcome: np.ndarray | str) -> str | None:
        """What is wrong with the frames or the reason that came of it; None where nothing is."""
        if isinstance(outcome, str):
            if self.reason is None:
                return f"{self.name} must give frames, but: {outcome}"
            if not outcome.startswith(str(folder / self.name)) or "\n" in outcome:
                return f"{self.name}: not one sentence that names the file: {outcome!r}"
            if not re.search(self.reason, outcome):
                return f"{self.name}: /{self.reason}/ is not in {outcome!r}"
            return None
        if self.pixels is None:
            return f"{self.name} must be refused, but gave frames"
        return None if self.pixels(outcome) else f"{self.name} gave wrong frames"


def plain(colour: Colour, tolerance: int = 6) -> Callable[[np.ndarray], bool]:
    """Every pixel of every frame has the colour."""
    return lambda frames: bool(np.abs(frames.astype(int) - colour).max() <= tolerance)


def halves(left: Colour, right: Colour, tolerance: int = 20) -> Callable[[np.ndarray], bool]:
    """The left and the right half have their colours, but for the seam."""

    def check(frames: np.ndarray) -> bool:
        off = max(
            np.abs(frames[:, :, : SIDE // 2 - 3].astype(int) - left).max(),
            np.abs(frames[:, :, SIDE // 2 + 3 :].astype(int) - right).max(),
        )
        return bool(off <= tolerance)

    return check


def greys(*levels: int, tolerance: int = 4) -> Callable[[np.ndarray], bool]:
    """Frame k is evenly grey with level k."""

    def check(frames: np.ndarray) -> bool:
        expected = np.array(levels)[:, None, None, None]
        return len(frames) == len(levels) and bool(np.abs(frames - expected).max() <= tolerance)

    return check


def anything(frames: np.ndarray) -> bool:
    """No frame is wrong: the file carries nothing to tell damaged pixels from meant ones by."""
    return True
