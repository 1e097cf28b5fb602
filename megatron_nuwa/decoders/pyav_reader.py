"""Reading a clip with PyAV; called in the worker process only, because hostile files crash it."""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from contextlib import closing
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nuwa.decoders.backends import (
    CONTAINERS,
    PROTOCOLS,
    Filter,
    Shown,
    entry_point,
    sampling_filters,
    shape_filters,
    window_filters,
)
from megatron_nuwa.decoders.settings import DecodeError, DecodeSettings


def frames(
    path: Path, settings: DecodeSettings, start: float, wanted: int, rate: Fraction
) -> np.ndarray:
    """As `ClipBackend.frames`."""
    filters = window_filters(start) + sampling_filters(rate) + shape_filters(settings)
    pictures = []
    for frame in _filtered(path, start, [*filters, ("format", "rgb24")]):
        pictures.append(frame.to_ndarray())
        if len(pictures) == wanted:
            break
    return np.stack(pictures) if pictures else np.empty((0, 1, 1, 3), np.uint8)


def shown(path: Path, start: float, seconds: float | None) -> list[Shown]:
    """As `ClipBackend.shown`."""
    filters = window_filters(start)
    if seconds is not None:
        filters.append(("trim", f"end={seconds:.6f}"))
    found = [
        Shown(frame.pts * frame.time_base, frame.duration * frame.time_base)
        for frame in _filtered(path, start, [*filters, ("scale", "2:2")])
    ]
    return sorted(found, key=lambda frame: frame.time)


def _filtered(path: Path, start: float, filters: list[Filter]) -> Iterator[Any]:
    import av

    try:
        with av.open(
            f"file:{path}",
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": PROTOCOLS},
        ) as container:
            # Known before a frame is decoded, and not told by the frames that PyAV gives.
            ratio = container.streams.video[0].sample_aspect_ratio if container.streams.video else 0
            with closing(_decoded(path, container, start)) as source:
                yield from _through_graph(path, source, filters, Fraction(ratio or 0))
    except av.error.MemoryError as error:
        raise DecodeError(
            f"{path} cannot be decoded as a video: it needs more memory than is allowed"
        ) from error
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DecodeError(f"{path} cannot be decoded as a video: {reason}") from error


def _decoded(path: Path, container: Any, start: float) -> Generator[Any, None, None]:
    """The frames of the first video stream, their times counted from the file's own start."""
    import av

    if not container.streams.video:
        raise DecodeError(f"{path} cannot be decoded as a video: it holds no video stream")
    stream = container.streams.video[0]
    stream.thread_count = 1
    origin = container.start_time or 0
    entry = entry_point(start)
    if entry:
        container.seek(int(entry * av.time_base) + origin)
    shift = round(Fraction(origin, av.time_base) / stream.time_base)
    # Where it is not told that no more packets are wanted, PyAV never frees its buffers.
    with closing(container.demux(stream)) as packets:
        for packet in packets:
            if packet.is_corrupt:
                raise DecodeError(f"{path} cannot be decoded as a video: corrupt packet")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise DecodeError(f"{path} cannot be decoded as a video: corrupt decoded frame")
                if frame.pts is None:
                    frame.pts = frame.dts
                if frame.pts is not None:
                    frame.pts -= shift
                yield frame


def _through_graph(
    path: Path, source: Iterator[Any], filters: list[Filter], ratio: Fraction
) -> Iterator[Any]:
    import av

    graph = None
    shape = None
    for frame in source:
        if graph is None:
            shape = (frame.width, frame.height, frame.format.name)
            graph = _graph(path, frame, filters, ratio)
        elif shape != (frame.width, frame.height, frame.format.name):
            raise DecodeError(f"{path} cannot be decoded as a video: its frames change their size")
        try:
            graph.push(frame)
        except av.error.EOFError:
            # A filter wants no more.
            yield from _ready(graph)
            return
        yield from _ready(graph)
    if graph is not None:
        graph.push(None)
        yield from _ready(graph)


def _graph(path: Path, frame: Any, filters: list[Filter], ratio: Fraction) -> Any:
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    source = (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
        f":time_base={frame.time_base.numerator}/{frame.time_base.denominator}"
        f":pixel_aspect={ratio.numerator}/{ratio.denominator}"
        f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    )
    nodes = [graph.add("buffer", source)]
    for name, arguments in [*_upright(path, frame), *filters]:
        nodes.append(graph.add(name, arguments))
    nodes.append(graph.add("buffersink"))
    for upstream, downstream in pairwise(nodes):
        upstream.link_to(downstream)
    graph.configure()
    return graph


def _ready(graph: Any) -> Iterator[Any]:
    import av

    while True:
        try:
            yield graph.pull()
        except (BlockingIOError, av.error.EOFError):
            return


def _upright(path: Path, frame: Any) -> list[Filter]:
    """The filters that ffmpeg's command line puts in front where a file asks to be turned."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return []
    cells = struct.unpack("=9i", bytes(matrix)[:36])
    angle = round(-frame.rotation) % 360
    if angle == 90:
        return [("transpose", "cclock_flip" if cells[3] > 0 else "clock")]
    if angle == 270:
        return [("transpose", "clock_flip" if cells[3] < 0 else "cclock")]
    if angle == 180:
        turned = [("hflip", "")] if cells[0] < 0 else []
        return turned + ([("vflip", "")] if cells[4] < 0 else [])
    if angle == 0:
        return [("vflip", "")] if cells[4] < 0 else []
    raise DecodeError(f"{path} cannot be decoded as a video: it is turned by {angle} degrees")
