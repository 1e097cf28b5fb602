"""What a clip of moving digits says: its digit, its two motions, its caption, its path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_nuwa.errors import UserError

DIGITS = 10
# Steps (rows, columns) of each direction, and of standing still.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
STOP = "stops"
STEPS = {**DIRECTIONS, STOP: (0, 0)}
# First one way, then another way or no further.
MOTIONS = tuple((first, second) for first in DIRECTIONS for second in STEPS if second != first)
# One caption in so many is never trained on.
_HELD_OUT_PERIOD = 5
# Coprime to the period, so that the held-out digits of neighbouring motions differ.
_HELD_OUT_STRIDE = 2


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: a digit that goes one way, and then another or no further."""

    digit: int
    first: str
    second: str

    @property
    def motion(self) -> tuple[str, str]:
        """Both directions."""
        return self.first, self.second

    @property
    def caption(self) -> str:
        """The sentence that a model reads."""
        return f"the digit {self.digit} moves {motion_text(self.motion)}"

    @property
    def is_held_out(self) -> bool:
        """Whether the caption is kept from training: every fifth, of all digits and motions."""
        place = MOTIONS.index(self.motion)
        return (self.digit + _HELD_OUT_STRIDE * place) % _HELD_OUT_PERIOD == 0


def motion_text(motion: tuple[str, str]) -> str:
    """Two motions as a caption says them."""
    first, second = motion
    return f"{first}, then {second}"


def scenes(*, held_out: bool | None = None) -> list[Scene]:
    """All scenes in a fixed order, or only those whose captions are (not) held out."""
    every = [Scene(digit, *motion) for digit in range(DIGITS) for motion in MOTIONS]
    return [scene for scene in every if held_out is None or scene.is_held_out == held_out]


def scene_of(caption: str) -> Scene:
    """The scene that a caption asks for; `UserError` for any other text."""
    for scene in scenes():
        if scene.caption == caption:
            return scene
    raise UserError(f"'{caption}' is no caption of moving digits, such as '{scenes()[1].caption}'")


def image_caption(digit: int) -> str:
    """The caption of a still image of a digit."""
    return f"the digit {digit}"


def digit_of(caption: str) -> int:
    """The digit that the caption of a still image asks for; `UserError` for any other text."""
    for digit in range(DIGITS):
        if caption == image_caption(digit):
            return digit
    raise UserError(f"'{caption}' is no caption of a digit, such as '{image_caption(7)}'")


def directions(motion: tuple[str, str], transitions: int) -> Iterator[str]:
    """The direction of each step from one frame to the next: the first half goes the first way."""
    first, second = motion
    for step in range(transitions):
        yield first if step < transitions // 2 else second


def offsets(motion: tuple[str, str], frames: int, step: int) -> np.ndarray:
    """Where the digit is in each frame, from its start: int (frames, 2), rows and columns."""
    moves = [STEPS[name] for name in directions(motion, frames - 1)]
    return np.concatenate([np.zeros((1, 2), int), np.cumsum(moves, axis=0)]) * step
