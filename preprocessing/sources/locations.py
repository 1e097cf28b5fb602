"""Local paths and fsspec addresses (`s3://bucket/name`), alike."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import fsspec

from megatron_nuwa.errors import UserError

# An address is a text: as a path its two slashes would become one.
Location = Path | str

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.:-]+)?://")


def locate(text: str | Path) -> Location:
    """The address that a text is, or the local path."""
    if isinstance(text, str) and _ADDRESS.match(text):
        return text
    return Path(text)


def join(folder: Location, name: str) -> Location:
    """A name as written in a file of the folder: relative to it, absolute, or an address."""
    if _ADDRESS.match(name):
        return name
    if isinstance(folder, Path):
        return folder / name
    named = Path(name)
    return named if named.is_absolute() else f"{folder.rstrip('/')}/{named.as_posix()}"


def parent(location: Location) -> Location:
    """The folder that a file lies in."""
    return location.parent if isinstance(location, Path) else location.rpartition("/")[0]


def suffix(location: Location) -> str:
    """The last suffix of the name, in lower case."""
    return Path(str(location)).suffix.lower()


def file_name(address: str) -> str:
    """What the file at an address is called; of a chain (`zip://a.png::x.zip`), the innermost."""
    link = next(link for link in address.split("::") if "://" in link)
    return link.rpartition("/")[2]


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address and the path in it; raises what fsspec raises."""
    return fsspec.core.url_to_fs(address)


def open_binary(location: Location) -> IO[bytes]:
    """A readable, seekable stream; raises `OSError` and what the file system raises."""
    if isinstance(location, Path):
        return location.open("rb")
    system, path = file_system(location)
    stream: IO[bytes] = system.open(path, "rb")
    # One of an archive (zip://, tar://) closes it as soon as nobody holds the file system.
    stream.file_system = system  # type: ignore[attr-defined]
    return stream


@contextmanager
def readable(location: Location, kind: str = "") -> Iterator[None]:
    """Turn whatever goes wrong with a file in the block into a `UserError` that begins with it.

    `kind` stands before the file, as in "manifest s3://bucket/m.csv".
    """
    what = f"{kind} {location}".lstrip()
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{what} does not exist") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text") from error
    except MemoryError:
        raise
    except Exception as error:
        # Every file system of fsspec has errors of its own, and so has every kind of archive.
        if isinstance(location, Path) and not isinstance(error, (OSError, ValueError)):
            raise
        told = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{what} cannot be read: {told or type(error).__name__}") from error


# Open files that are kept for the next piece.
_OPEN_READERS = 16


class RandomReader:
    """Reads pieces of a file; opened at the first of them, and anew where it is unpickled."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._stream: IO[bytes] | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on; `UserError` naming the file where they are not there."""
        with self._lock, readable(self.location):
            if self._stream is None:
                self._stream = open_binary(self.location)
            self._stream.seek(offset)
            content = self._stream.read(size)
        if len(content) != size:
            raise UserError(f"{self.location} has become shorter while it was read")
        return content

    def __reduce__(self) -> tuple[Any, ...]:
        return RandomReader, (self.location,)


@lru_cache(maxsize=_OPEN_READERS)
def reader_of(location: Location) -> RandomReader:
    """A reader of a file: one that was used lately, so that few files are open at a time."""
    return RandomReader(location)
