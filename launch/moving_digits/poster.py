"""One moving picture of what a run generates, for places that show no page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from launch.moving_digits.scorer import Reading, decoded
from launch.moving_digits.world import World
from megatron_nuwa.generation.media import write_gif

COLUMNS, ROWS = 6, 3
_TILE, _GAP = 108, 14
# Two lines below each clip.
_LINE, _LINE_LETTERS = 14, 19
_PAPER, _INK, _WRONG = (251, 250, 247), (28, 29, 32), (190, 60, 20)
# The first frame stays longer, so that one sees where a clip begins.
_PAUSE_FRAMES = 2


def write_poster(path: Path, world: World, readings: Sequence[Reading]) -> None:
    """Write a GIF of clips with their captions, in orange where the scorer read something else.

    Shows up to 18 of `readings`, at equal distances.
    """
    count = min(len(readings), COLUMNS * ROWS)
    chosen = [readings[len(readings) * place // count] for place in range(count)]
    items = [(Path(reading.file), reading.caption) for reading in chosen]
    clips = [frames for _, frames, _ in decoded(world, items)]
    order = [*[0] * _PAUSE_FRAMES, *range(world.frames), *[world.frames - 1] * _PAUSE_FRAMES]
    pages = np.stack([_page(chosen, [clip[number] for clip in clips]) for number in order])
    write_gif(path, pages, world.frames_per_second, {"captions": "held out from training"})


def _page(readings: Sequence[Reading], frames: Sequence[np.ndarray]) -> np.ndarray:
    rows = -(-len(readings) // COLUMNS)
    step = _TILE + _GAP, _TILE + 2 * _LINE + _GAP
    page = Image.new("RGB", (COLUMNS * step[0] + _GAP, rows * step[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=11)
    for number, (reading, frame) in enumerate(zip(readings, frames, strict=True)):
        left = _GAP + number % COLUMNS * step[0]
        top = _GAP + number // COLUMNS * step[1]
        tile = Image.fromarray(frame).resize((_TILE, _TILE), Image.Resampling.NEAREST)
        page.paste(tile, (left, top))
        colour = _INK if reading.digit_is_right and reading.motion_is_right else _WRONG
        for line, text in enumerate(textwrap.wrap(reading.caption, _LINE_LETTERS)):
            draw.text((left, top + _TILE + 3 + line * _LINE), text, colour, font)
    return np.asarray(page)
