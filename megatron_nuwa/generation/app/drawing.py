"""What was uploaded and drawn in the page's editors, as requests take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from megatron_nuwa.decoders import DecodeSettings, fitted_image
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.given import read_given
from megatron_nuwa.generation.palette import classes_of, coloured
from megatron_nuwa.generation.regions import check_fits, touched
from megatron_nuwa.generation.tasks import Request, Task
from megatron_nuwa.generation.trained import Generator

# Editors show pictures at least this large.
CANVAS_SIDE = 384

# What an editor gives: arrays of `background`, `layers` and `composite`.
Drawing = dict[str, Any]


def enlarged(picture: np.ndarray) -> np.ndarray:
    """(rows, columns, 3), each pixel repeated until there is room to draw."""
    times = max(1, -(-CANVAS_SIDE // picture.shape[0]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def blank_sketch(side: int) -> np.ndarray:
    """An empty sketch, all of class 0, to be drawn on: uint8 (rows, columns, 3)."""
    return enlarged(coloured(np.zeros((side, side), np.uint8), 1))


def first_frame(generator: Generator, clip: Path) -> np.ndarray:
    """The first frame of a clip, to draw a region on: uint8 (rows, columns, 3)."""
    return enlarged(_read_clip(generator, clip, 1)[0])


def read_request(
    generator: Generator,
    task: Task,
    seed: int,
    *,
    prompt: str,
    picture: Drawing | None,
    clip: Path | None,
    sketch: Drawing | None,
    keep_frames: int,
    frames: int,
) -> Request:
    """One request from what the page holds; `UserError` where the task lacks something.

    `frames` is the length of a video, of which `keep_frames` are given to be continued.
    """
    prompt = {"prompt": prompt} if task.reads == "text" else {}  # type: ignore[assignment]
    size = generator.picture_size
    drawn = _read_sketch(generator, sketch) if task.reads == "sketch" else None
    pixels = region = None
    if task.media == "image":
        pixels = _read_picture(picture, size)
    elif task.media == "clip":
        if clip is None:
            raise UserError("upload a video first")
        count = keep_frames if task.given == "frames" else frames
        pixels = _read_clip(generator, clip, count)
    if task.given == "region":
        region = touched(_painted(picture), *size)[None]
    return Request(task, seed, **prompt, pixels=pixels, region=region, sketch=drawn)  # type: ignore[arg-type]


def _read_picture(picture: Drawing | None, size: tuple[int, int]) -> np.ndarray:
    background = None if picture is None else picture["background"]
    if background is None:
        raise UserError("upload a picture first")
    pixels = np.asarray(background)
    check_fits(pixels.shape[:2], size, "crop", "the picture")
    return fitted_image(Image.fromarray(pixels), DecodeSettings(image_size=size[0]))


def _read_clip(generator: Generator, clip: Path, frames: int) -> np.ndarray:
    size, rate = generator.picture_size, generator.frames_per_second
    try:
        return read_given(clip, "clip", size, frames, rate).frames
    except UserError as error:
        # The folder is gradio's, and tells a visitor nothing.
        raise UserError(str(error).replace(str(clip), clip.name)) from error


def _painted(picture: Drawing | None) -> np.ndarray:
    """Where anything was painted on any layer: bool (rows, columns)."""
    layers = [] if picture is None else [np.asarray(layer) for layer in picture["layers"] or ()]
    painted = [layer[..., 3] > 0 for layer in layers if layer.ndim == 3 and layer.shape[2] == 4]
    if not painted or not np.any(painted):
        raise UserError("paint over what is to be made new first")
    return np.any(painted, axis=0)


def _read_sketch(generator: Generator, sketch: Drawing | None) -> np.ndarray:
    """The class of each pixel of what was drawn: uint8 (1, rows, columns)."""
    if generator.sketch_vqgan is None:
        raise UserError("this model was not trained on sketches")
    if sketch is None or sketch["composite"] is None:
        raise UserError("draw a sketch first")
    config = generator.sketch_vqgan.config
    maps = classes_of(_over_class_0(np.asarray(sketch["composite"])), config.classes or 0)
    side = (config.image_size, config.image_size)
    fitted = ImageOps.fit(Image.fromarray(maps), side, Image.Resampling.NEAREST)
    return np.asarray(fitted)[None]


def _over_class_0(pixels: np.ndarray) -> np.ndarray:
    """What is seen of (rows, columns, 3 or 4) over an empty sketch: (rows, columns, 3)."""
    # What is fully transparent has any colour, mostly black, which is nobody's choice.
    alpha = pixels[..., 3:] / 255 if pixels.shape[-1] == 4 else 1.0
    seen = alpha * pixels[..., :3] + (1 - alpha) * coloured(np.zeros((1, 1), np.uint8), 1)
    return np.rint(seen).astype(np.uint8)
