"""Files that are whole or absent, and their checksums."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

_CHUNK = 1 << 20


@contextmanager
def written_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file when the block ends, and vanish when it fails."""
    # Opened as any other file is, so that its mode is the one that the umask gives.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Where a library that writes by name may write; becomes the file when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # A killed process of the same number may have left one, of another mode.
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors puts a private file of its own in the place of this one.
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file, and its folder, so that readers see the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as stream:
        stream.write(text.encode())


def try_to_write(write: Callable[[], object]) -> None:
    """Write what a run can do without: a full disk costs that and not the run, and is told."""
    try:
        write()
    except OSError as error:
        print(f"warning: not written: {error}", flush=True)


def sync(path: Path) -> None:
    """Have a file or a folder's entries on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Lock(NamedTuple):
    """An open file; `holds` says whether it is locked, which some file systems cannot do."""

    handle: int
    holds: bool

    def release(self) -> None:
        """Give it back, as the end of the process does."""
        os.close(self.handle)


def try_lock(path: Path) -> Lock | None:
    """Lock a file, which is made; None where another process, or this one, has it locked.

    Where the file system knows no locks, as some of clusters do, that is said, and the file is
    opened all the same. Raises `OSError` where it cannot be opened.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            print(
                f"warning: {path.parent} cannot be locked ({error.strerror or error}): take care "
                "that no other command writes to it",
                flush=True,
            )
            return Lock(handle, holds=False)
        # Whoever had it may have removed the file a moment ago.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return Lock(handle, holds=True)
        os.close(handle)


def why_unreadable(path: Path) -> str | None:
    """Why the system does not open a file, in its words; None where it does."""
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return error.strerror


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
