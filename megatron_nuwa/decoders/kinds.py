"""Which files are images, which are clips, and which are neither."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from megatron_nuwa.decoders.settings import DecodeError

MediaKind = Literal["image", "clip"]

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".jp2", ".avif"),
)
CLIP_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts"),
    *(".flv", ".ogv", ".wmv", ".asf", ".mxf"),
)


def media_kind(path: Path) -> MediaKind:
    """Whether a file is an image or a clip, by its first bytes or, if unknown, by its name.

    Raises `DecodeError` for a file that is missing, empty or neither.
    """
    by_content = _kind_of_content(read_head(path))
    if by_content is not None:
        return by_content
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in CLIP_SUFFIXES:
        return "clip"
    raise DecodeError(f"{path} is neither an image nor a video of a known kind")


def read_head(path: Path) -> bytes:
    """The first bytes of a regular file; `DecodeError` where there is none to read."""
    try:
        # A pipe without a writer would hold up the opening of it for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DecodeError(f"{path} is not a regular file")
            head = os.read(handle, 32)
        finally:
            os.close(handle)
    except FileNotFoundError as error:
        raise DecodeError(f"{path} does not exist") from error
    except OSError as error:
        raise DecodeError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise DecodeError(f"{path} is empty")
    return head


def _kind_of_content(head: bytes) -> MediaKind | None:
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")):
        return "image"
    if head.startswith(
        (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"OggS", b"\0\0\x01\xba", b"\0\0\x01\xb3")
    ):
        return "clip"
    if head.startswith(b"RIFF"):
        return {b"WEBP": "image", b"AVI ": "clip"}.get(head[8:12])  # type: ignore[return-value]
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in (b"avif", b"avis", b"heic", b"mif1") else "clip"
    return None
