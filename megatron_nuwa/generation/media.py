"""Pictures and clips as files that carry how they were made."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program, not_started
from megatron_nuwa.errors import UserError

_FFMPEG_SECONDS = 120
_PAUSE_MILLISECONDS = 600
# Above it, a page of lossless clips would become too heavy.
_LARGEST_LOSSLESS_SIDE = 128


def write_png(path: Path, frame: np.ndarray, origin: Mapping[str, object]) -> None:
    """Write uint8 (rows, columns, 3) with the origin (prompt, seed, …) as text chunks."""
    info = PngInfo()
    for key, value in origin.items():
        info.add_itxt(key, str(value))
    Image.fromarray(frame).save(path, pnginfo=info)


def write_gif(
    path: Path, frames: np.ndarray, frames_per_second: float, origin: Mapping[str, object]
) -> None:
    """Write uint8 (frames, rows, columns, 3) as an endless GIF; the origin is its comment."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(
        path,
        save_all=True,
        append_images=rest,
        duration=round(1000 / frames_per_second),
        loop=0,
        comment=json.dumps(dict(origin)).encode(),
    )


def write_mp4(
    path: Path, frames: np.ndarray, frames_per_second: float, origin: Mapping[str, object]
) -> None:
    """Write uint8 (frames, rows, columns, 3) as H.264; the origin is its comment.

    Raises `OSError` for a full disk, `UserError` for whatever else ffmpeg complains of.
    """
    _, rows, columns, _ = frames.shape
    stream = ffmpeg.input(
        "pipe:0",
        format="rawvideo",
        pix_fmt="rgb24",
        s=f"{columns}x{rows}",
        framerate=frames_per_second,
    )
    # Players want even sides in 4:2:0, whatever the model's resolution is.
    stream = stream.filter("pad", "ceil(iw/2)*2", "ceil(ih/2)*2").output(
        str(path),
        vcodec="libx264",
        pix_fmt="yuv420p",
        crf=16,
        movflags="+faststart",
        metadata=f"comment={json.dumps(dict(origin))}",
    )
    done = _run_ffmpeg(stream, frames.tobytes())
    if done.returncode:
        path.unlink(missing_ok=True)
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number).encode() in done.stderr:
                raise OSError(number, os.strerror(number), str(path))
        raise UserError(f"ffmpeg could not write {path}: {_complaint(done)}")


def contact_sheet(clips: np.ndarray) -> np.ndarray:
    """uint8 (clips, frames, rows, columns, 3) → one picture: a row a clip, a column a frame.

    Images, clips of one frame, stand in as many columns as rows.
    """
    count, frames, *shape = clips.shape
    if frames == 1:
        side = math.ceil(math.sqrt(count))
        rows = math.ceil(count / side)
        cells = np.full((rows * side, *shape), 255, np.uint8)
        cells[:count] = clips[:, 0]
        clips = cells.reshape(rows, side, *shape)
    return np.concatenate([np.concatenate(list(clip), axis=1) for clip in clips], axis=0)


def still(frame: np.ndarray, lossless: bool = True) -> str:
    """A data address of a picture, uint8 (rows, columns, 3): a PNG, or else a smaller WebP."""
    buffer = io.BytesIO()
    if not lossless:
        Image.fromarray(frame).save(buffer, "WEBP", quality=90)
        return _address("image/webp", buffer.getvalue())
    Image.fromarray(frame).save(buffer, "PNG", optimize=True)
    return _address("image/png", buffer.getvalue())


def animation(frames: np.ndarray, frames_per_second: float, lossless: bool = True) -> str:
    """A data address of an endless WebP; `frames` is uint8 (frames, rows, columns, 3).

    The last frame stays a moment longer, so that the eye sees where a clip begins again.
    """
    durations = [round(1000 / frames_per_second)] * len(frames)
    durations[-1] += _PAUSE_MILLISECONDS
    first, *rest = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    first.save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=rest,
        duration=durations,
        loop=0,
        lossless=lossless,
        quality=90,
    )
    return _address("image/webp", buffer.getvalue())


def address(frames: np.ndarray, frames_per_second: float, lossless: bool | None = None) -> str:
    """`still` of an image, `animation` of a clip; large ones lose a little unless told not to."""
    if lossless is None:
        lossless = frames.shape[1] <= _LARGEST_LOSSLESS_SIDE
    if len(frames) == 1:
        return still(frames[0], lossless)
    return animation(frames, frames_per_second, lossless)


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _run_ffmpeg(stream: Any, content: bytes) -> subprocess.CompletedProcess[bytes]:
    command = stream.global_args("-nostdin", "-v", "error", "-xerror").compile(
        cmd=ffmpeg_program(), overwrite_output=True
    )
    try:
        return subprocess.run(
            command, input=content, capture_output=True, timeout=_FFMPEG_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"ffmpeg took longer than {_FFMPEG_SECONDS} s") from error
    except OSError as error:
        raise not_started(command, error) from error


def _complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else "it gave no reason"
