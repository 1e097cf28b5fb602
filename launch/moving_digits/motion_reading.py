"""Reads which way a digit moves, from the centre of the ink in each frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from launch.moving_digits.motions import MOTIONS, STEPS, directions
from launch.moving_digits.world import World

# Darker pixels count as background: a tokenizer's reconstruction is not quite black there.
_BACKGROUND = 0.15
# A frame with less ink than so many full pixels shows no digit.
_LEAST_INK = 4.0
# How far a step may be from the true one, as a share of its length.
_TOLERANCE = 0.5


@dataclass(frozen=True)
class Motion:
    """What was seen: the direction of every step, None where it is none, nor standing still."""

    steps: tuple[str | None, ...]

    @property
    def motion(self) -> tuple[str, str] | None:
        """The motion of which every single step is, if there is one."""
        for motion in MOTIONS:
            if tuple(directions(motion, len(self.steps))) == self.steps:
                return motion
        return None


def ink_of(frames: np.ndarray) -> np.ndarray:
    """Ink from 0 to 1, float32 (frames, rows, columns), of uint8 grey or colour frames."""
    grey = frames if frames.ndim == 3 else frames.mean(-1)
    ink = grey.astype(np.float32) / 255
    return np.where(ink < _BACKGROUND, 0, ink)


def centres(ink: np.ndarray) -> np.ndarray:
    """Centre of the ink (rows, columns) in each frame, float (frames, 2); NaN without a digit."""
    mass = ink.sum((1, 2))
    rows, columns = np.arange(ink.shape[1]), np.arange(ink.shape[2])
    weighted = np.stack([(ink.sum(2) * rows).sum(1), (ink.sum(1) * columns).sum(1)], axis=1)
    found = weighted / np.maximum(mass, 1e-6)[:, None]
    return np.where(mass[:, None] < _LEAST_INK, np.nan, found)


def read_motion(frames: np.ndarray, world: World) -> Motion:
    """The motion of a clip uint8 (frames, side, side) or (frames, side, side, 3)."""
    steps = np.diff(centres(ink_of(frames)), axis=0) / world.step
    return Motion(tuple(_direction(step) for step in steps))


def _direction(step: np.ndarray) -> str | None:
    """The direction of a step in units of the true length, None where none is near."""
    names = list(STEPS)
    distances = np.linalg.norm(np.array([STEPS[name] for name in names]) - step, axis=1)
    nearest = int(np.nan_to_num(distances, nan=np.inf).argmin())
    return names[nearest] if distances[nearest] <= _TOLERANCE else None
