"""Any media file to the frames that the settings ask for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_nuwa.decoders.clips import sample_clip
from megatron_nuwa.decoders.guard import guarded
from megatron_nuwa.decoders.kinds import media_kind
from megatron_nuwa.decoders.settings import (
    DEFAULT_LIMITS,
    Decoded,
    DecodeError,
    DecodeLimits,
    DecodeSettings,
)


def decode(
    path: Path,
    settings: DecodeSettings,
    start: float | None = None,
    end: float | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> tuple[np.ndarray, int]:
    """Frames uint8 (frames, H, W, 3) of an image or a clip, and how many of them are real.

    Raises `DecodeError` naming the file, also where its kind is not the one the settings ask for.
    """
    decoded = decode_media(path, settings, start, end, limits)
    return decoded.frames, decoded.real


def decode_media(
    path: Path,
    settings: DecodeSettings,
    start: float | None = None,
    end: float | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> Decoded:
    """As `decode`, with the rate that the frames were taken at.

    Nothing that a file holds can harm the calling process: it is decoded in another one, whose
    time and memory are limited.
    """
    kind = media_kind(path)
    if settings.frames == 1:
        if kind != "image":
            raise DecodeError(f"{path} is a video, but images are asked for (frames = 1)")
        if start is not None or end is not None:
            raise DecodeError(f"{path} is an image, so it cannot have 'start' or 'end'")
        return Decoded(guarded("image", path, limits, settings=settings), 1, None)
    if kind != "clip":
        raise DecodeError(
            f"{path} is an image, but clips of {settings.frames} frames are asked for"
        )
    return sample_clip(path, settings, start, end, limits)
