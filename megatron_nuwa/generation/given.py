"""What generation starts from, read from files and fitted to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ImageOps, ImageSequence

from megatron_nuwa.decoders import (
    DecodeError,
    DecodeSettings,
    MediaKind,
    decode_clip,
    decode_image,
    decode_sketch,
    media_facts,
    media_kind,
    sketch_size,
)
from megatron_nuwa.decoders.facts import clip_facts
from megatron_nuwa.decoders.images import in_8_bits, opened_image
from megatron_nuwa.decoders.kinds import read_head
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.regions import (
    check_fits,
    check_frames,
    frame_range,
    rectangle,
    touched,
)

_AN = {"image": "an image", "clip": "a video"}
_NPY = b"\x93NUMPY"
# The one kind that may be either.
_GIF = b"GIF8"


@dataclass(frozen=True)
class Given:
    """Frames uint8 (frames, rows, columns, 3) of the model's size, and the file's (rows, columns).

    The file's size is the one that it is shown at: upright, with square pixels.
    """

    path: Path
    frames: np.ndarray
    shape: tuple[int, int]


def read_texts(path: Path) -> list[str]:
    """The texts of a file of --prompts, one a line; `UserError` naming it where there are none."""
    try:
        # Some editors begin a file with a byte-order mark, which is no part of the first text.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"--prompts {path} holds no text")
    return texts


def read_given(
    path: Path,
    kind: MediaKind,
    size: tuple[int, int],
    frames: int,
    frames_per_second: float,
    fit: Literal["crop", "exact"] = "crop",
) -> Given:
    """An image, or the first `frames` frames of a clip at the model's rate.

    Fitted like a corpus: scaled to the model's `size` (rows, columns) and centre-cropped. Raises
    `UserError` naming the file where that would enlarge it or cut more than half of it away, or
    where `fit` is exact and the size another.
    """
    found = media_kind(path)
    if found != kind and not (kind == "clip" and read_head(path).startswith(_GIF)):
        raise UserError(f"{path} is {_AN[found]}, and {_AN[kind]} is needed here")
    facts = clip_facts(path) if kind == "clip" else media_facts(path)
    shape = (facts.height, facts.width)
    check_fits(shape, size, fit, str(path))
    settings = DecodeSettings(
        image_size=size[0], frames=frames, frames_per_second=frames_per_second
    )
    pixels = decode_image(path, settings) if kind == "image" else decode_clip(path, settings)[0]
    return Given(path, pixels, shape)


def read_given_sketch(
    path: Path,
    side: int,
    classes: int,
    frames: int,
    fit: Literal["crop", "exact"] = "crop",
    unlabelled: int | None = None,
    frames_per_second: float = 2.5,
) -> np.ndarray:
    """A sketch's class numbers, uint8 (frames, side, side); a single map holds for all frames.

    Fitted like an image (`read_given`), to the nearest pixel. Pixels of the value `unlabelled`
    become the last class. Raises `UserError` naming the file, also where it has some maps and yet
    too few.
    """
    width, height = sketch_size(path)
    check_fits((height, width), (side, side), fit, str(path))
    settings = DecodeSettings(
        image_size=side, frames=frames, frames_per_second=frames_per_second, short_clips="pad"
    )
    maps, real = decode_sketch(path, settings, classes, unlabelled=unlabelled)
    if 1 < real < frames:
        raise UserError(
            f"{path} has {real} maps, and {frames} frames are drawn: give one map for all frames, "
            "or one for each"
        )
    return maps


def read_region(
    given: Given,
    size: tuple[int, int],
    region: str | None,
    mask: Path | None,
    region_frames: str | None,
) -> np.ndarray:
    """The pixels that are made new: bool (frames or 1, rows, columns) at the model's `size`.

    What --region, --mask and --region-frames of the command say; without the first two, all pixels
    of the chosen frames. Raises `UserError` naming the argument or the file.
    """
    if mask is not None:
        found = read_mask(mask, given, size)
    elif region is not None:
        rows, columns = given.shape
        found = touched(rectangle(region, columns, rows, "--region"), *size)[None]
    else:
        found = np.ones((1, *size), bool)
    if region_frames is None:
        return found
    frames = len(given.frames)
    check_frames(found, frames)
    chosen = np.zeros((frames, 1, 1), bool)
    chosen[frame_range(region_frames, frames, "--region-frames")] = True
    return found & chosen


def read_mask(path: Path, given: Given, size: tuple[int, int]) -> np.ndarray:
    """The region that a mask makes new: bool (frames or 1, rows, columns) at the model's `size`.

    White and transparent pixels of an image or an animation, or whatever is not 0 of an `.npy`
    array (rows, columns) or (frames, rows, columns). A mask has the size of what it masks, or the
    model's. Raises `UserError` naming the file.
    """
    mask = _read_array(path) if read_head(path).startswith(_NPY) else _read_picture(path)
    shape = mask.shape[1:]
    if shape not in (given.shape, size):
        raise UserError(
            f"{path} is {shape[1]} × {shape[0]} pixels, but {given.path} is {given.shape[1]} × "
            f"{given.shape[0]}: a mask has the size of what it masks"
        )
    return touched(mask, *size)


def _read_array(path: Path) -> np.ndarray:
    try:
        mask = np.load(path, allow_pickle=False)
    # Foreign bytes raise whatever the header's parser stumbles on.
    except Exception as error:
        raise UserError(f"{path} is not a readable .npy file") from error
    if mask.ndim not in (2, 3) or not mask.size or mask.dtype.kind not in "uib":
        raise UserError(
            f"{path} must hold bool or integers (rows, columns) or (frames, rows, columns), not "
            f"{mask.dtype} {mask.shape}"
        )
    return (mask != 0).reshape(-1, *mask.shape[-2:])


def _read_picture(path: Path) -> np.ndarray:
    with opened_image(path) as opened:
        frames: Sequence[np.ndarray] = [
            np.asarray(in_8_bits(ImageOps.exif_transpose(frame)).convert("LA"))
            for frame in ImageSequence.Iterator(opened)
        ]
    if len({frame.shape for frame in frames}) > 1:
        raise DecodeError(f"{path} has frames of different sizes")
    mask = np.stack(frames)
    return (mask[..., 0] > 127) | (mask[..., 1] < 128)
