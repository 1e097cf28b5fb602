"""Sketches: maps of class numbers, a still one or one a frame, kept exact on their way in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import GifImagePlugin, ImageSequence

from megatron_nuwa.decoders.guard import guarded
from megatron_nuwa.decoders.images import opened_image, target_size
from megatron_nuwa.decoders.kinds import read_head
from megatron_nuwa.decoders.settings import (
    DEFAULT_LIMITS,
    DecodeError,
    DecodeLimits,
    DecodeSettings,
)

# Formats that keep the numbers; a JPEG would blur them.
_FORMATS = ("PNG", "GIF")
_NPY = b"\x93NUMPY"
_UNLABELLED_HINT = 255
# What Pillow multiplies grey levels of 2 and 4 bits with.
_GREY_STEPS = {2: 85, 4: 17}


def decode_sketch(
    path: Path,
    settings: DecodeSettings,
    classes: int,
    *,
    unlabelled: int | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> tuple[np.ndarray, int]:
    """The maps of a sketch, sized and cropped like its medium: uint8 (frames, H, W), and how many
    of them are real.

    A sketch is a PNG or GIF whose pixel values (grey or palette indices) are classes, or an `.npy`
    of integers (rows, columns) or (frames, rows, columns). Frame k belongs to the k-th frame of the
    medium; a GIF's frames count as often as `frames_per_second` fits into their duration, and at
    least once. Pixels of the value `unlabelled` become the last class. With too few maps the last
    one is repeated where `short_clips` is pad. Raises `DecodeError` that names the file, also for a
    class outside 0 … classes − 1.
    """
    maps = guarded("sketch", path, limits, settings, classes=classes, unlabelled=unlabelled)
    real = len(maps)
    if real == settings.frames:
        return maps, real
    if settings.frames == 1:
        raise DecodeError(f"{path} has more than one map, but belongs to an image")
    if settings.short_clips != "pad":
        raise DecodeError(f"{path} has {real} maps, and {settings.frames} are needed")
    return np.concatenate([maps, np.repeat(maps[-1:], settings.frames - real, axis=0)]), real


def sketch_size(path: Path, limits: DecodeLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Width and height of the maps of a sketch; raises `DecodeError` that names the file."""
    width, height = guarded("sketch-size", path, limits, DecodeSettings(image_size=1))
    return width, height


def map_size(path: Path) -> tuple[int, int]:
    """As `sketch_size`, for files that are trusted."""
    if read_head(path).startswith(_NPY):
        _, height, width = _read_npy(path).shape
        return width, height
    with opened_image(path, _FORMATS) as opened:
        return opened.size


def read_sketch(
    path: Path, settings: DecodeSettings, classes: int, unlabelled: int | None
) -> np.ndarray:
    """The real maps of a sketch, at most `frames`: uint8 (frames, H, W); raises `DecodeError`.

    For files that are trusted; `decode_sketch` reads them in another process.
    """
    is_still = settings.frames == 1
    # One map too many tells a still sketch from one that moves.
    wanted = 2 if is_still else settings.frames
    if read_head(path).startswith(_NPY):
        stack = _read_npy(path)[:wanted]
        maps = [
            _checked(path, each, place, classes, unlabelled) for place, each in enumerate(stack)
        ]
    else:
        maps = []
        for each, times in _read_picture(path, settings.frames_per_second):
            checked = _checked(path, each, len(maps), classes, unlabelled)
            maps += [checked] * (1 if is_still else times)
            if len(maps) >= wanted:
                break
    return np.stack([_fitted(each, settings) for each in maps[:wanted]])


def _read_npy(path: Path) -> np.ndarray:
    """The maps (frames, rows, columns) of an .npy file, mapped into memory."""
    try:
        stack = np.load(path, mmap_mode="r", allow_pickle=False)
    # Foreign bytes raise whatever the header's parser stumbles on.
    except Exception as error:
        raise DecodeError(f"{path} is not a readable .npy file") from error
    if stack.ndim == 2:
        stack = stack[None]
    if stack.ndim != 3 or not stack.size or stack.dtype.kind not in "uib":
        raise DecodeError(
            f"{path} must hold integers (rows, columns) or (frames, rows, columns), not "
            f"{stack.dtype} {stack.shape}"
        )
    return stack


def _read_picture(path: Path, frames_per_second: float) -> Iterator[tuple[np.ndarray, int]]:
    """Each map (rows, columns) of a PNG or GIF, and for how many frames it stands."""
    step = _grey_step(read_head(path))
    with opened_image(path, _FORMATS) as opened, _palettes_kept():
        for frame in ImageSequence.Iterator(opened):
            if frame.mode not in ("1", "L", "P") and not frame.mode.startswith("I"):
                raise DecodeError(
                    f"{path} is no map of classes, but a picture in colours (mode {frame.mode}); a "
                    f"sketch has one number a pixel, a grey level or an index into one palette for "
                    f"all frames"
                )
            seconds = frame.info.get("duration", 0) / 1000
            yield np.asarray(frame) // step, max(1, round(seconds * frames_per_second))


def _grey_step(head: bytes) -> int:
    """How far apart Pillow puts the grey levels of a file that begins so."""
    is_grey_png = head.startswith(b"\x89PNG") and head[25:26] == b"\0"
    return _GREY_STEPS.get(head[24], 1) if is_grey_png else 1


@contextmanager
def _palettes_kept() -> Iterator[None]:
    """Have Pillow leave the palette indices of later GIF frames what they are."""
    before = GifImagePlugin.LOADING_STRATEGY
    GifImagePlugin.LOADING_STRATEGY = (
        GifImagePlugin.LoadingStrategy.RGB_AFTER_DIFFERENT_PALETTE_ONLY
    )
    try:
        yield
    finally:
        GifImagePlugin.LOADING_STRATEGY = before


def _checked(
    path: Path, numbers: np.ndarray, frame: int, classes: int, unlabelled: int | None
) -> np.ndarray:
    """A map as uint8, its classes held against their number."""
    if unlabelled is not None:
        numbers = np.where(numbers == unlabelled, classes - 1, numbers)
    wrong = (numbers < 0) | (numbers >= classes)
    if wrong.any():
        row, column = (int(place) for place in np.argwhere(wrong)[0])
        value = int(numbers[row, column])
        hint = advice = ""
        if value == _UNLABELLED_HINT:
            hint = " (usually the mark of unlabelled pixels)"
            advice = (
                f"; if it is such a mark, name it (--sketch-unlabelled {value}, or data.unlabelled "
                "where a VQ-GAN is trained)"
            )
        raise DecodeError(
            f"{path} has class {value}{hint} at row {row}, column {column} of map {frame}, but the "
            f"classes are 0 … {classes - 1}{advice}"
        )
    return numbers.astype(np.uint8)


def _fitted(numbers: np.ndarray, settings: DecodeSettings) -> np.ndarray:
    """The map at the medium's size and centre crop; each pixel is its nearest one's class."""
    height, width = numbers.shape
    columns, rows = target_size(width, height, settings)
    scale = max(columns / width, rows / height)
    return numbers[np.ix_(_nearest(height, rows, scale), _nearest(width, columns, scale))]


def _nearest(length: int, wanted: int, scale: float) -> np.ndarray:
    """Which of `length` pixels lies under each of `wanted`, around the common centre."""
    places = (np.arange(wanted) + 0.5 - wanted / 2) / scale + length / 2
    return np.clip(np.floor(places).astype(np.int64), 0, length - 1)
