"""What every reader of clips does, whichever library it uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_nuwa.decoders.settings import DecodeLimits, DecodeSettings

# A clip inside a long video is entered this much early, because containers without an exact index
# and codecs with leading pictures (MPEG-TS, HEVC) give their first frames up to a key frame late.
SEEK_LEAD_SECONDS = 12.0

# Containers that hold their own media. Playlists (HLS, DASH, concat) are left out because they
# name further files and addresses, which a hostile item could use to read what it should not.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,gif,h264,hevc,ivf,nut,mxf"
PROTOCOLS = "file,pipe"

Filter = tuple[str, str]


@dataclass(frozen=True)
class Shown:
    """When a frame of a clip is shown: seconds after the window's start, and for how long."""

    time: Fraction
    duration: Fraction


class ClipBackend(ABC):
    """Reads the frames of clips; both methods raise `DecodeError` naming the file."""

    @abstractmethod
    def frames(
        self,
        path: Path,
        settings: DecodeSettings,
        start: float,
        wanted: int,
        rate: Fraction,
        limits: DecodeLimits,
    ) -> np.ndarray:
        """At most `wanted` frames shown at `start + k / rate` seconds: uint8 (real, H, W, 3)."""

    @abstractmethod
    def shown(
        self, path: Path, start: float, seconds: float | None, limits: DecodeLimits
    ) -> list[Shown]:
        """All frames of the window of `seconds` from `start` on (None: to the end), in order."""


def entry_point(start: float) -> float:
    """Where to enter a file for a window that begins at `start`, in seconds."""
    return max(0.0, start - SEEK_LEAD_SECONDS)


def window_filters(start: float) -> list[Filter]:
    """ffmpeg filters that make `start` the zero of time."""
    if not start:
        return []
    # A time base as coarse as a frame (AVI) could not hold a time between two frames; it is
    # divided, not replaced, so that the frames' own times stay exact.
    return [("settb", "if(gt(intb,0.00001),intb/1000,intb)"), ("setpts", f"PTS-{start:.6f}/TB")]


def sampling_filters(rate: Fraction) -> list[Filter]:
    """ffmpeg filters that pick the frame shown at every `k / rate` seconds."""
    # Rounding up gives output k the last frame with a time stamp of at most k/F.
    return [("fps", f"fps={rate.numerator}/{rate.denominator}:round=up:start_time=0")]


def shape_filters(settings: DecodeSettings) -> list[Filter]:
    """ffmpeg filters that resize a frame and cut its centre out."""
    side, multiple = settings.image_size, settings.side_multiple
    scale = (
        f"w=max({side},round({side}*dar)):h=max({side},round({side}/dar))"
        ":flags=bicubic+accurate_rnd+full_chroma_int+bitexact"
    )
    crop = f"{side}:{side}"
    if settings.fit == "native":
        crop = ":".join(f"max({side},trunc({axis}/{multiple})*{multiple})" for axis in ("iw", "ih"))
    return [("scale", scale), ("crop", crop)]
