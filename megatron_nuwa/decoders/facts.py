"""What is known of a media file without decoding all of it: its size and its length."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_nuwa.decoders.ffmpeg_backend import open_video, parse_framecrc, run_ffmpeg
from megatron_nuwa.decoders.guard import guarded
from megatron_nuwa.decoders.kinds import MediaKind, media_kind
from megatron_nuwa.decoders.settings import (
    DEFAULT_LIMITS,
    DecodeError,
    DecodeLimits,
    DecodeSettings,
)


@dataclass(frozen=True)
class MediaFacts:
    """Width and height in square pixels, as shown upright; `seconds` is None for an image."""

    kind: MediaKind
    width: int
    height: int
    seconds: float | None


def media_facts(path: Path, limits: DecodeLimits = DEFAULT_LIMITS) -> MediaFacts:
    """The facts of an image or a clip; `DecodeError` naming the file where it has none."""
    if media_kind(path) == "clip":
        return clip_facts(path, limits)
    width, height = guarded("image-size", path, limits, DecodeSettings(image_size=1))
    return MediaFacts("image", width, height, None)


def clip_facts(path: Path, limits: DecodeLimits = DEFAULT_LIMITS) -> MediaFacts:
    """The facts of a file that is read as a clip, such as a moving GIF."""
    first = run_ffmpeg(path, open_video(path), limits, format="framecrc", frames=1)
    header, shown = parse_framecrc(first)
    if not shown:
        raise DecodeError(f"{path} has no video frame")
    # The container's own times, read without decoding a frame.
    _, packets = parse_framecrc(
        run_ffmpeg(path, open_video(path), limits, format="framecrc", vcodec="copy")
    )
    ends = [packet.time + packet.duration for packet in packets]
    width, height = (int(side) for side in header["dimensions"].split("x"))
    numerator, denominator = (int(part) for part in header.get("sar", "1/1").split("/"))
    if numerator and denominator:
        width = round(width * Fraction(numerator, denominator))
    return MediaFacts("clip", width, height, float(max(ends)) if ends else 0.0)
