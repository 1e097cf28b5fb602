"""Media of items as frames, wherever they lie."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from megatron_nuwa.decoders import (
    Decoded,
    DecodeError,
    DecodeLimits,
    DecodeSettings,
    decode_media,
    decode_sketch,
)
from megatron_nuwa.decoders.settings import DEFAULT_LIMITS
from megatron_nuwa.errors import UserError
from preprocessing.sources.items import Media, SourceItem, TarMember
from preprocessing.sources.locations import file_name, open_binary, readable, reader_of
from preprocessing.state import writing

_CHUNK = 1 << 20


def decode_item(
    item: SourceItem, settings: DecodeSettings, limits: DecodeLimits = DEFAULT_LIMITS
) -> Decoded:
    """The frames of an item; `DecodeError` names its medium as the source does."""
    with local_copy(item.media, limits) as path:
        return decode_copy(item, path, settings, limits)


def decode_copy(
    item: SourceItem, path: Path, settings: DecodeSettings, limits: DecodeLimits = DEFAULT_LIMITS
) -> Decoded:
    """The same where the medium is a local file already."""
    with named_as_source(item.media, path):
        return decode_media(path, settings, item.start, item.end, limits)


def decode_item_sketch(
    item: SourceItem,
    settings: DecodeSettings,
    classes: int,
    unlabelled: int | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> tuple[np.ndarray, int]:
    """The maps of an item's sketch, as `decode_sketch`; `UserError` where it has none."""
    if item.sketch is None:
        raise UserError(f"item {item.id!r} has no sketch")
    with local_copy(item.sketch, limits) as path, named_as_source(item.sketch, path):
        return decode_sketch(path, settings, classes, unlabelled=unlabelled, limits=limits)


@contextmanager
def named_as_source(media: Media, path: Path) -> Iterator[None]:
    """Have a `DecodeError` name a medium as the source does, not as its copy is called."""
    try:
        yield
    except DecodeError as error:
        # A copy has a name that differs from run to run.
        raise type(error)(str(error).replace(str(path), str(media))) from error


@contextmanager
def local_copy(media: Media, limits: DecodeLimits = DEFAULT_LIMITS) -> Iterator[Path]:
    """A local file with the content of a medium, removed afterwards where it is a copy.

    Raises `DecodeError` where there is nothing to copy, or more than the limits allow, and
    `MachineError` where the disk has no room for the copy.
    """
    if isinstance(media, Path):
        yield media
        return
    name = media.name if isinstance(media, TarMember) else file_name(media)
    with ExitStack() as copies:
        place = Path(tempfile.gettempdir())
        with writing(place, "the folder for temporary files (TMPDIR)"):
            # A disk that has become read-only must not hide in its own error what it cost.
            folder = copies.enter_context(
                tempfile.TemporaryDirectory(prefix="medium-", ignore_cleanup_errors=True)
            )
            # The suffix may have to say what kind of medium this is.
            path = Path(folder) / f"medium{Path(name).suffix}"
            with path.open("wb") as copy:
                for piece in _pieces(media, limits):
                    copy.write(piece)
        yield path


def _pieces(media: TarMember | str, limits: DecodeLimits) -> Iterator[bytes]:
    """The content of a medium; whatever keeps it from being read is a `DecodeError`."""
    try:
        yield from _read(media, limits)
    except DecodeError:
        raise
    except UserError as error:
        raise DecodeError(str(error)) from error


def _read(media: TarMember | str, limits: DecodeLimits) -> Iterator[bytes]:
    if isinstance(media, TarMember):
        if media.size < 0:
            raise DecodeError(f"{media} has neither an image nor a video")
        _check_size(media, media.size, limits)
        reader = reader_of(media.tar)
        for done in range(0, media.size, _CHUNK):
            yield reader.read(media.offset + done, min(_CHUNK, media.size - done))
        return
    read = 0
    with readable(media), open_binary(media) as stream:
        while chunk := stream.read(_CHUNK):
            read += len(chunk)
            _check_size(media, read, limits)
            yield chunk


def _check_size(media: TarMember | str, size: int, limits: DecodeLimits) -> None:
    if size > limits.download_bytes:
        raise DecodeError(
            f"{media} is larger than the {limits.download_gib:g} GiB that are allowed"
        )
