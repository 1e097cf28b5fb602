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
    """Sizes in pixels, and the length of a clip: an odd number of frames, `step` pixels apart.

    Every motion has room from every start, so that a start says nothing about what comes.
    Digits start at multiples of `raster` pixels: with that of the tokenizer's patches a token shows
    one and the same part of a digit in every frame, which a small model learns much sooner.
    """

    side: int = Field(36, ge=16)
    digit: int = Field(16, ge=8)
    step: int = Field(4, ge=1)
    raster: int = Field(4, ge=1)
    frames: int = Field(5, ge=3)
    frames_per_second: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _paths_fit(self) -> World:
        if self.frames % 2 == 0:
            raise ValueError(
                f"frames must be odd, so that both motions have as many steps, not {self.frames}"
            )
        if self.step % self.raster:
            raise ValueError(f"step {self.step} must be a multiple of raster {self.raster}")
        needed = self.digit + 2 * self.reach
        if needed > self.side:
            raise ValueError(
                f"a digit of {self.digit} pixels that moves {self.reach} pixels any way needs "
                f"{needed} pixels; the side is {self.side}"
            )
        return self

    @property
    def reach(self) -> int:
        """How far a digit goes one way, in pixels."""
        return (self.frames - 1) // 2 * self.step


def world_of(recipe: Recipe, digit: int, step: int, raster: int) -> World:
    """The world of a recipe's frames and clips.

    Raises `UserError` for a recipe without VQ-GAN or model, and for sizes in which no path fits.
    """
    recipe.require("vqgan", "model")
    assert recipe.vqgan is not None
    assert recipe.model is not None
    sizes = {
        "side": recipe.vqgan.model.image_size,
        "digit": digit,
        "step": step,
        "raster": raster,
        "frames": recipe.model.position_grid[2],
        "frames_per_second": recipe.vqgan.data.frames_per_second,
    }
    return parse_settings(World, sizes, f"recipe '{recipe.name}'")


def path(world: World, motion: tuple[str, str], random: np.random.Generator) -> np.ndarray:
    """Upper left corners of the digit, int (frames, 2): a random start, always inside the frame."""
    return start(world, random) + offsets(motion, world.frames, world.step)


def start(world: World, random: np.random.Generator) -> np.ndarray:
    """Where a digit may be when a clip begins: int (2,), rows and columns."""
    return _place(world, world.reach, random)


def anywhere(world: World, random: np.random.Generator) -> np.ndarray:
    """Where a digit may be in any frame: int (2,), rows and columns."""
    return _place(world, 0, random)


def _place(world: World, margin: int, random: np.random.Generator) -> np.ndarray:
    """A place on the raster, `margin` pixels or more away from the frame's border."""
    first = -(-margin // world.raster)
    last = (world.side - world.digit - margin) // world.raster
    return random.integers(first, last, 2, endpoint=True) * world.raster


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
