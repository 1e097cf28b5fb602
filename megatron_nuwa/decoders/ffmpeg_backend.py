"""Clips by the ffmpeg program, one process a clip."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg
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
from megatron_nuwa.decoders.ffmpeg_process import BrokenVideoError, KilledError, written_by
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.decoders.restarts import STARTS
from megatron_nuwa.decoders.settings import DecodeError, DecodeLimits, DecodeSettings


class TooLongFilmError(DecodeError):
    """A film of more frames than are allowed, which no further attempt can mend."""

    permanent = True


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
    at_once: int,
    limits: DecodeLimits,
) -> Generator[np.ndarray, None, None]:
    """All frames shown at `start + k / rate` seconds, before `end`: uint8 (frames, H, W, 3) each.

    They are stretched to `size` (W, H) and come `at_once` at a time, fewer at the end. Of
    `limits`, `seconds` holds for each minute of the film. A caller that leaves before the end must
    close the iterator. Raises `DecodeError` naming the file.
    """
    width, height = size
    # Small before they are many: where time stamps lie far apart, the same frame comes again and
    # again.
    scale = ("scale", f"{width}:{height}")
    filters = [*window_filters(start), scale, *sampling_filters(rate)]
    # One time stamp far in the future makes endless frames of a small file.
    most = math.floor(limits.film_hours * 3600 * rate)
    wanted = most + 1
    if end is not None:
        wanted = min(wanted, max(1, math.ceil(round((end - start) * float(rate), 6))))
    output = {"pix_fmt": "rgb24", "format": "rawvideo", "frames": wanted}
    command = _command(_filtered(path, start, filters), **output)
    frame = width * height * 3
    count = 0
    with closing(written_by(path, command, limits, minute=math.ceil(60 * rate) * frame)) as pieces:
        for part in _in_parts_of(at_once * frame, pieces):
            count += len(part) // frame
            if count > most:
                raise TooLongFilmError(
                    f"{path} is longer than the {limits.film_hours:g} hours that are allowed, or "
                    "has a time stamp that is wrong"
                )
            yield np.frombuffer(part, np.uint8).reshape(-1, height, width, 3)


def _in_parts_of(size: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes cut anew; the last part is what is left."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def run_ffmpeg(path: Path, video: Any, limits: DecodeLimits, **output: Any) -> bytes:
    """What ffmpeg writes for a graph of ffmpeg-python; `DecodeError` where it cannot."""
    command = _command(video, **output)
    killed = None
    for _ in range(STARTS):
        try:
            return b"".join(written_by(path, command, limits))
        except KilledError as error:
            killed = error
    raise DecodeError(f"{killed}, {STARTS} times") from killed


def _command(video: Any, **output: Any) -> list[str]:
    command: list[str] = (
        video.output("pipe:", **{"fps_mode": "passthrough", "filter_threads": 1, **output})
        .global_args("-nostdin", "-v", "error", "-xerror", "-copyts", "-start_at_zero")
        .compile(cmd=ffmpeg_program())
    )
    return command


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


def _frames_of_ppm(raw: bytes) -> np.ndarray:
    """Binary PPM pictures of one size, end to end, as uint8 (frames, H, W, 3)."""
    head = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", raw)
    if head is None:
        return np.empty((0, 1, 1, 3), np.uint8)
    width, height = int(head[1]), int(head[2])
    pictures = np.frombuffer(raw, np.uint8).reshape(-1, head.end() + width * height * 3)
    return pictures[:, head.end() :].reshape(-1, height, width, 3)
