"""The little world of moving digits: sizes, and how a scene is drawn."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from launch.moving_digits.motions import offsets
from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.training.recipe import Recipe

# Ink of at least so much counts as the digit in a sketch.
_SKETCH_INK = 0.25


class World(Settings):
    """Sizes in pixels, and the length of a clip: an odd number of frames, `step` pixels apart."""

    side: int = Field(32, ge=16)
    digit: int = Field(14, ge=8)
    step: int = Field(4, ge=1)
    frames: int = Field(5, ge=3)
    frames_per_second: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _paths_fit(self) -> World:
        if self.frames % 2 == 0:
            raise ValueError(
                f"frames must be odd, so that both motions have as many steps, not {self.frames}"
            )
        reach = self.digit + (self.frames - 1) * self.step
        if reach > self.side:
            raise ValueError(
                f"a digit of {self.digit} pixels that moves {self.frames - 1} times {self.step} "
                f"pixels needs {reach} pixels; the side is {self.side}"
            )
        return self


def world_of(recipe: Recipe) -> World:
    """The world of a recipe's frames and clips: digits fill it as far as their paths allow.

    Raises `UserError` for a recipe without VQ-GAN or model, and for sizes in which no path fits.
    """
    recipe.require("vqgan", "model")
    assert recipe.vqgan is not None
    assert recipe.model is not None
    side, frames = recipe.vqgan.model.image_size, recipe.model.position_grid[2]
    digit = side * 7 // 16
    sizes = {
        "side": side,
        "digit": digit,
        "step": (side - digit) // max(1, frames - 1),
        "frames": frames,
        "frames_per_second": recipe.vqgan.data.frames_per_second,
    }
    return parse_settings(World, sizes, f"recipe '{recipe.name}'")


def path(world: World, motion: tuple[str, str], random: np.random.Generator) -> np.ndarray:
    """Upper left corners of the digit, int (frames, 2): a random start, always inside the frame."""
    moved = offsets(motion, world.frames, world.step)
    lowest, highest = -moved.min(0), world.side - world.digit - moved.max(0)
    return random.integers(lowest, highest, endpoint=True) + moved


def place(world: World, random: np.random.Generator) -> np.ndarray:
    """A path of one place, (1, 2), anywhere in the frame."""
    return random.integers(0, world.side - world.digit, (1, 2), endpoint=True)


def draw(world: World, ink: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Grey frames uint8 (frames, side, side): ink (digit, digit) from 0 to 1 at each corner."""
    frames = np.zeros((len(corners), world.side, world.side), np.uint8)
    shades = (ink * 255).round().astype(np.uint8)
    for frame, (row, column) in zip(frames, corners, strict=True):
        frame[row : row + world.digit, column : column + world.digit] = shades
    return frames


def sketch(frames: np.ndarray, digit: int) -> np.ndarray:
    """Maps of classes like `frames`: 0 is background, digit + 1 its ink."""
    return np.where(frames >= _SKETCH_INK * 255, digit + 1, 0).astype(np.uint8)
