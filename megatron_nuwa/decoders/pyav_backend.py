"""Clips by PyAV, the libraries of ffmpeg inside a worker process."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_nuwa.decoders.backends import ClipBackend, Shown
from megatron_nuwa.decoders.guard import guarded
from megatron_nuwa.decoders.settings import DecodeLimits, DecodeSettings
from megatron_nuwa.errors import UserError


class PyavBackend(ClipBackend):
    """The same filters as `FfmpegBackend`, without the start of a program for every clip."""

    def frames(
        self,
        path: Path,
        settings: DecodeSettings,
        start: float,
        wanted: int,
        rate: Fraction,
        limits: DecodeLimits,
    ) -> np.ndarray:
        require_pyav()
        frames = guarded(
            "frames", path, limits, settings, start=start, wanted=wanted, rate=str(rate)
        )
        assert isinstance(frames, np.ndarray)
        return frames

    def shown(
        self, path: Path, start: float, seconds: float | None, limits: DecodeLimits
    ) -> list[Shown]:
        require_pyav()
        settings = DecodeSettings(image_size=1)
        pairs = guarded("shown", path, limits, settings, start=start, seconds=seconds)
        return [Shown(Fraction(time), Fraction(duration)) for time, duration in pairs]


def require_pyav() -> None:
    """`UserError` that says what to install where PyAV is absent."""
    if importlib.util.find_spec("av") is None:
        raise UserError("the backend 'pyav' needs PyAV: pip install 'megatron-nuwa[pyav]'")
