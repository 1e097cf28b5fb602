"""Clips by the ffmpeg program, one process a clip."""

from __future__ import annotations

import contextlib
import math
import re
import signal
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg
import numpy as np

from megatron_nuwa.decoders.backends import (
    CONTAINERS,
    PROTOCOLS,
    ClipBackend,
    Filter,
    Shown,
    entry_point,
    sampling_filters,
    shape_filters,
    window_filters,
)
from megatron_nuwa.decoders.restarts import STARTS, was_killed
from megatron_nuwa.decoders.settings import DecodeError, DecodeLimits, DecodeSettings


class BrokenVideoError(DecodeError):
    """ffmpeg has met something that it cannot decode."""


class FfmpegBackend(ClipBackend):
    """ffmpeg's own command line, its filter graph built by ffmpeg-python."""

    def frames(
        self,
        path: Path,
        settings: DecodeSettings,
        start: float,
        wanted: int,
        rate: Fraction,
        limits: DecodeLimits,
    ) -> np.ndarray:
        filters = window_filters(start) + sampling_filters(rate) + shape_filters(settings)
        crop = settings.fit == "crop"
        # Frames of a size that only ffmpeg knows carry it with them.
        form = {"format": "rawvideo"} if crop else {"format": "image2pipe", "vcodec": "ppm"}
        output = {"pix_fmt": "rgb24", "frames": wanted, **form}
        try:
            raw = run_ffmpeg(path, _filtered(path, start, filters), limits, **output)
        except BrokenVideoError:
            # ffmpeg reads ahead, so it may or may not have met damage that lies after the window.
            # That must not depend on luck: what is read now ends with the window.
            last = start - entry_point(start) + float((wanted - 1) / rate) + 0.001
            video = _filtered(path, start, filters, t=f"{last:.6f}")
            raw = run_ffmpeg(path, video, limits, **output)
        if not crop:
            return _frames_of_ppm(raw)
        side = settings.image_size
        real, rest = divmod(len(raw), side * side * 3)
        if rest or real > wanted:
            raise DecodeError(f"{path} gave {len(raw)} bytes, which is no number of whole frames")
        return np.frombuffer(raw, np.uint8).reshape(real, side, side, 3)

    def shown(
        self, path: Path, start: float, seconds: float | None, limits: DecodeLimits
    ) -> list[Shown]:
        filters = window_filters(start)
        if seconds is not None:
            filters.append(("trim", f"end={seconds:.6f}"))
        # As few pixels as there can be: only the times are of interest.
        video = _filtered(path, start, [*filters, ("scale", "2:2")])
        return parse_framecrc(run_ffmpeg(path, video, limits, format="framecrc"))[1]


def read_scaled(
    path: Path,
    start: float,
    end: float | None,
    rate: Fraction,
    size: tuple[int, int],
    limits: DecodeLimits,
) -> np.ndarray:
    """All frames shown at `start + k / rate` seconds, before `end`: uint8 (frames, H, W, 3).

    They are stretched to `size` (W, H). Raises `DecodeError` naming the file.
    """
    width, height = size
    filters = [*window_filters(start), *sampling_filters(rate), ("scale", f"{width}:{height}")]
    output: dict[str, Any] = {"pix_fmt": "rgb24", "format": "rawvideo"}
    if end is not None:
        output["frames"] = max(1, math.ceil(round((end - start) * float(rate), 6)))
    raw = run_ffmpeg(path, _filtered(path, start, filters), limits, **output)
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def run_ffmpeg(path: Path, video: Any, limits: DecodeLimits, **output: Any) -> bytes:
    """What ffmpeg writes for a graph of ffmpeg-python; `DecodeError` where it cannot."""
    command = (
        video.output("pipe:", **{"fps_mode": "passthrough", "filter_threads": 1, **output})
        .global_args("-nostdin", "-v", "error", "-xerror", "-copyts", "-start_at_zero")
        .compile(cmd=imageio_ffmpeg.get_ffmpeg_exe())
    )
    for _ in range(STARTS):
        code, written, said = _run_limited(path, command, limits)
        if not was_killed(code):
            break
    else:
        raise DecodeError(
            f"{path} cannot be decoded as a video: ffmpeg was killed {STARTS} times "
            f"({signal.Signals(-code).name})"
        )
    if code != 0:
        raise BrokenVideoError(f"{path} cannot be decoded as a video: {_complaint(code, said)}")
    return written


def open_video(path: Path, start: float = 0.0, **options: Any) -> Any:
    """The first video stream of a file, as ffmpeg-python names it."""
    # The name is given as a file: address, so that no name can be taken for another protocol.
    options |= {"protocol_whitelist": PROTOCOLS, "format_whitelist": CONTAINERS, "threads": 1}
    entry = entry_point(start)
    if entry:
        options |= {"ss": f"{entry:.6f}", "noaccurate_seek": None}
    # Time stamps are kept as the file has them: shifting them by `entry` would round them.
    return ffmpeg.input(f"file:{path.absolute()}", **options).video


def parse_framecrc(text: bytes) -> tuple[dict[str, str], list[Shown]]:
    """The header and the frame times that ffmpeg's framecrc format holds, in order of time."""
    header: dict[str, str] = {}
    shown = []
    for line in text.decode(errors="replace").splitlines():
        if line.startswith("#"):
            name, _, value = line[1:].partition(":")
            header[name.removesuffix(" 0")] = value.strip()
        else:
            fields = line.split(",")
            base = Fraction(header["tb"])
            shown.append(Shown(int(fields[2]) * base, int(fields[3]) * base))
    return header, sorted(shown, key=lambda frame: frame.time)


def _filtered(path: Path, start: float, filters: Sequence[Filter], **options: Any) -> Any:
    video = open_video(path, start, **options)
    for name, arguments in filters:
        named, placed = {}, []
        for argument in arguments.split(":"):
            key, separator, value = argument.partition("=")
            if separator:
                named[key] = value
            else:
                placed.append(argument)
        video = video.filter(name, *placed, **named)
    return video


def _run_limited(
    path: Path, command: Sequence[str], limits: DecodeLimits
) -> tuple[int, bytes, bytes]:
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        _limit(process.pid, limits)
        try:
            written, said = process.communicate(timeout=limits.seconds)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.communicate()
            raise DecodeError(f"{path} took longer than {limits.seconds:g} s to decode") from error
        except BaseException:
            process.kill()
            raise
    return process.returncode, written, said


def _limit(process: int, limits: DecodeLimits) -> None:
    """Bound a process that has just started; a no-op where the system has no prlimit."""
    with contextlib.suppress(ImportError, AttributeError, ProcessLookupError):
        # Set from outside: a function run between fork and exec would forbid the cheap vfork,
        # and copying the page tables of a process that holds a VQ-GAN costs milliseconds.
        import resource

        memory = limits.memory_bytes
        resource.prlimit(process, resource.RLIMIT_AS, (memory, memory))
        # For an ffmpeg whose parent was killed and cannot end it.
        seconds = math.ceil(limits.seconds) + 5
        resource.prlimit(process, resource.RLIMIT_CPU, (seconds, seconds))


def _complaint(code: int, said: bytes) -> str:
    """What ffmpeg said first, in words that are the same in every run."""
    lines = said.decode(errors="replace").strip().splitlines()
    if any("Cannot allocate memory" in line or "get_buffer() failed" in line for line in lines):
        return "it needs more memory than is allowed"
    if not lines:
        return f"ffmpeg ended with code {code}"
    if "matches no streams" in lines[0]:
        return "it holds no video stream"
    # In front stands the part of ffmpeg that speaks, with its address in memory.
    return re.sub(r"^(\[[^]]*\] )+", "", lines[0]).rstrip(".")


def _frames_of_ppm(raw: bytes) -> np.ndarray:
    """Binary PPM pictures of one size, end to end, as uint8 (frames, H, W, 3)."""
    head = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", raw)
    if head is None:
        return np.empty((0, 1, 1, 3), np.uint8)
    width, height = int(head[1]), int(head[2])
    pictures = np.frombuffer(raw, np.uint8).reshape(-1, head.end() + width * height * 3)
    return pictures[:, head.end() :].reshape(-1, height, width, 3)
