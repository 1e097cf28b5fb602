"""A folder of shards that came from afar, never larger than it may be.

Several processes of a node share it. A file in it is whole and has the checksum that is its name;
while it is on its way it has another name, which also reserves its room.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from megatron_nuwa.data.cache_index import PART, CacheIndex
from megatron_nuwa.errors import UnreadableError, UserError

FOLDER_VARIABLE = "MEGATRON_NUWA_CACHE"
BYTES_VARIABLE = "MEGATRON_NUWA_CACHE_BYTES"
DEFAULT_FOLDER = Path("~/.cache/megatron_nuwa/shards")
DEFAULT_BYTES = 64 << 30
_CHUNK = 1 << 20
_POLL_SECONDS = 0.05


class ShardCache:
    """Files by their sha256, the least recently opened ones leaving first.

    At no moment do its files in the folder, with the room that arriving ones will take, exceed
    `max_bytes`; what others keep there is neither counted nor touched. A file that leaves while a
    reader maps it stays readable; the system frees its blocks when the last such reader lets go.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes

    @classmethod
    def default(cls) -> ShardCache:
        """The one that MEGATRON_NUWA_CACHE and MEGATRON_NUWA_CACHE_BYTES describe.

        Without them: 64 GiB in `~/.cache/megatron_nuwa/shards`.
        """
        text = os.environ.get(BYTES_VARIABLE, str(DEFAULT_BYTES))
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise UserError(f"{BYTES_VARIABLE} must be a whole number of bytes, not {text!r}")
        return cls(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER, int(text))

    def open(
        self, sha256: str, size: int, origin: str, fetch: Callable[[], IO[bytes]]
    ) -> IO[bytes]:
        """The file of this sha256 and `size` bytes, opened; `fetch` is called where it is absent.

        Raises `UserError` naming `origin` where what arrives is something else or does not fit into
        the cache, `UnreadableError` where it cannot be read or the cache not be written.
        """
        if size > self.max_bytes:
            raise UserError(
                f"{origin} has {size} bytes, more than the {self.max_bytes} of the cache "
                f"{self.folder}; set {BYTES_VARIABLE} higher"
            )
        path = self.folder / sha256
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            while True:
                # Another process may remove the file at any moment before it is open.
                with contextlib.suppress(FileNotFoundError):
                    stream = path.open("rb")
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(path)
                    return stream
                with self._arrival_lock(sha256):
                    if not path.exists():
                        self._bring(path, size, origin, fetch)
        except OSError as error:
            reason = error.strerror or error
            raise UnreadableError(
                f"{origin} cannot be brought into {self.folder}: {reason}"
            ) from error

    def _bring(self, path: Path, size: int, origin: str, fetch: Callable[[], IO[bytes]]) -> None:
        part = self.folder / f"{path.name}.{size}{PART}"
        self._reserve(part, size)
        try:
            digest, arrived = hashlib.sha256(), 0
            with part.open("wb") as target, _fetched(fetch, origin) as source:
                while arrived <= size and (chunk := _read(source, origin)):
                    arrived += len(chunk)
                    digest.update(chunk)
                    target.write(chunk)
                target.flush()
                os.fsync(target.fileno())
            if arrived != size or digest.hexdigest() != path.name:
                raise UserError(f"{origin} has other bytes than were written (its sha256 differs)")
            with self._room() as room:
                os.replace(part, path)
                room.forget(part.name)
                room.add(path.name)
        except BaseException:
            with self._room() as room:
                self._give_up(part, room)
            raise

    def _reserve(self, part: Path, size: int) -> None:
        """Make room by removing what was opened longest ago; wait where only arrivals are left."""
        while True:
            with self._room() as room:
                if self._make_room(size, part.name, room):
                    part.touch()
                    room.add_arrival(part.name, size)
                    return
            time.sleep(_POLL_SECONDS)

    def _make_room(self, size: int, name: str, room: CacheIndex) -> bool:
        for arrival in room.arrivals():
            self._give_up_dead(self.folder / arrival, name, room)
        while room.taken + size > self.max_bytes and (oldest := room.oldest()):
            (self.folder / oldest).unlink(missing_ok=True)
            room.forget(oldest)
        return room.taken + size <= self.max_bytes

    def _give_up_dead(self, part: Path, own: str, room: CacheIndex) -> None:
        """Remove an arriving file that a killed process has left.

        Whoever brings a file holds its arrival lock, which the caller does for those of its lock.
        """
        sha256 = part.name.split(".")[0]
        if sha256[:2] == own[:2]:
            self._give_up(part, room)
            return
        with contextlib.suppress(Timeout), self._arrival_lock(sha256, timeout=0):
            self._give_up(part, room)

    def _give_up(self, part: Path, room: CacheIndex) -> None:
        part.unlink(missing_ok=True)
        room.forget(part.name)
        with contextlib.suppress(FileNotFoundError):
            # Its process may have been killed after it had given it its name.
            room.add(part.name.split(".")[0])

    @contextlib.contextmanager
    def _room(self) -> Iterator[CacheIndex]:
        locks = self.folder / "locks"
        with FileLock(locks / "room"), CacheIndex(self.folder, locks / "index").opened() as room:
            yield room

    def _arrival_lock(self, sha256: str, timeout: float = -1) -> FileLock:
        # As many lock files as there are first bytes, not as many as there were ever shards.
        return FileLock(self.folder / "locks" / sha256[:2], timeout=timeout)


@contextlib.contextmanager
def _fetched(fetch: Callable[[], IO[bytes]], origin: str) -> Iterator[IO[bytes]]:
    try:
        stream = fetch()
    except Exception as error:
        raise UnreadableError(f"{origin} cannot be read: {_reason(error)}") from error
    try:
        yield stream
    finally:
        stream.close()


def _read(stream: IO[bytes], origin: str) -> bytes:
    try:
        return stream.read(_CHUNK)
    except Exception as error:
        raise UnreadableError(f"{origin} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
