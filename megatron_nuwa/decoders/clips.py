"""Clips: which frames are taken, and what becomes of clips that have too few."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_nuwa.decoders.backends import ClipBackend
from megatron_nuwa.decoders.ffmpeg_backend import FfmpegBackend
from megatron_nuwa.decoders.kinds import read_head
from megatron_nuwa.decoders.pyav_backend import PyavBackend
from megatron_nuwa.decoders.settings import (
    DEFAULT_LIMITS,
    Decoded,
    DecodeError,
    DecodeLimits,
    DecodeSettings,
)

_BACKENDS: dict[str, ClipBackend] = {"ffmpeg": FfmpegBackend(), "pyav": PyavBackend()}


def decode_clip(
    path: Path,
    settings: DecodeSettings,
    start: float | None = None,
    end: float | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> tuple[np.ndarray, int]:
    """The frames shown at `start + k / frames_per_second` seconds, before `end`, centre-cropped.

    Returns uint8 (frames, H, W, 3) and the number of real frames, which is smaller than `frames`
    only where short clips are padded with their last frame. Raises `DecodeError` for files that
    cannot be decoded without error, cost more than the limits, or are too short.
    """
    decoded = sample_clip(path, settings, start, end, limits)
    return decoded.frames, decoded.real


def sample_clip(
    path: Path,
    settings: DecodeSettings,
    start: float | None,
    end: float | None,
    limits: DecodeLimits,
) -> Decoded:
    """As `decode_clip`, with the rate that the frames were taken at."""
    read_head(path)
    backend = _BACKENDS[settings.backend]
    wanted = settings.frames
    if end is not None:
        # Rounded so that a window of exactly n steps does not gain one by a floating-point hair.
        steps = round((end - (start or 0.0)) * settings.frames_per_second, 6)
        wanted = min(wanted, math.ceil(steps))
    rate = Fraction(f"{settings.frames_per_second:.9g}").limit_denominator(10**6)
    frames = backend.frames(path, settings, start or 0.0, wanted, rate, limits)
    real = len(frames)
    if real == 0:
        raise DecodeError(f"{path} has no video frame{in_window(start, end)}")
    if real == settings.frames:
        return Decoded(frames, real, settings.frames_per_second)
    if settings.short_clips == "skip":
        raise DecodeError(
            f"{path} has {real} frames{in_window(start, end)} at {settings.frames_per_second:g} "
            f"frames a second, and {settings.frames} are needed"
        )
    if settings.short_clips == "faster":
        return _sample_faster(path, settings, start, end, limits)
    padding = np.repeat(frames[-1:], settings.frames - real, axis=0)
    return Decoded(np.concatenate([frames, padding]), real, settings.frames_per_second)


def _sample_faster(
    path: Path,
    settings: DecodeSettings,
    start: float | None,
    end: float | None,
    limits: DecodeLimits,
) -> Decoded:
    """`frames` frames spread evenly over a clip that is too short for the asked rate."""
    backend = _BACKENDS[settings.backend]
    seconds = None if end is None else end - (start or 0.0)
    shown = backend.shown(path, start or 0.0, seconds, limits)
    shown = [frame for frame in shown if frame.time + frame.duration > 0]
    if len(shown) < settings.frames:
        raise DecodeError(
            f"{path} has only {len(shown)} frames{in_window(start, end)} at any rate, and "
            f"{settings.frames} are needed"
        )
    length = shown[-1].time + shown[-1].duration
    if seconds is not None:
        length = min(length, Fraction(f"{seconds:.6f}"))
    # Rounded upwards: a rate too low by a hair would leave the last frame out.
    rate = Fraction(math.ceil(settings.frames / length * 10**6), 10**6)
    frames = backend.frames(path, settings, start or 0.0, settings.frames, rate, limits)
    if len(frames) != settings.frames:
        raise DecodeError(
            f"{path} has {len(frames)} frames{in_window(start, end)} at {float(rate):g} frames a "
            f"second, and {settings.frames} are needed"
        )
    return Decoded(frames, settings.frames, float(rate))


def in_window(start: float | None, end: float | None) -> str:
    """What is said after a number of frames; nothing where the window is the whole clip."""
    if start is None and end is None:
        return ""
    if end is None:
        return f" from {start:g} s on"
    return f" between {start or 0.0:g} and {end:g} s"
