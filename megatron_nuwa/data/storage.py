"""Where a corpus lies: in a folder of this machine, or at an address of any fsspec file system."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Protocol, TypeVar

import fsspec

from megatron_nuwa.data.cache import ShardCache
from megatron_nuwa.data.retry import patiently
from megatron_nuwa.data.shards import ShardEntry
from megatron_nuwa.errors import UnreadableError, UserError

T = TypeVar("T")
_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]+):(/+)", re.IGNORECASE)
# What another attempt to open a corpus would not change.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Storage(Protocol):
    """Reads the files of one corpus; `UnreadableError` where that fails.

    What is read while a corpus is opened is tried several times before.
    """

    address: str
    is_remote: bool

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        """Contents of small files in their order; `UserError` naming the first that is absent."""

    def find(self, name: str) -> bool:
        """Whether there is such a file."""

    def check(self, entry: ShardEntry) -> None:
        """`UserError` where it is plain without reading that the tar is not the one listed."""

    def open(self, entry: ShardEntry) -> IO[bytes]:
        """The shard's tar as an open file of this machine; tried once."""


def storage_at(address: str | Path, cache: ShardCache | None = None) -> Storage:
    """The storage behind a path or an address such as `s3://bucket/corpora/vatex`.

    Shards from an address come through the cache, by default the one of the environment.
    """
    text = str(address)
    match = _ADDRESS.match(text)
    if match is None:
        return LocalFolder(Path(address))
    system, slashes = match.groups()
    if slashes == "/":
        # A path object has folded them: two, or three where no host can stand between them.
        slashes = "///" if system.lower() in ("file", "local") else "//"
    return RemoteFolder(f"{system}:{slashes}{text[match.end() :]}", cache or ShardCache.default())


class LocalFolder:
    """A folder of this machine."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = str(folder)

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        for name in names:
            path = self.folder / name
            yield patiently(partial(_attempt, path, path.read_bytes))

    def find(self, name: str) -> bool:
        path = self.folder / name
        return patiently(partial(_attempt, path, path.is_file))

    def check(self, entry: ShardEntry) -> None:
        patiently(partial(check_tar, self.folder / f"{entry.name}.tar", entry))

    def open(self, entry: ShardEntry) -> IO[bytes]:
        path = self.folder / f"{entry.name}.tar"
        try:
            return path.open("rb")
        except OSError as error:
            # Also where it is missing: it was there when the corpus was opened.
            raise _unreadable(path, error) from error


class RemoteFolder:
    """A folder of another file system, its shards brought into the cache when they are read."""

    is_remote = True

    def __init__(self, address: str, cache: ShardCache) -> None:
        self.address = address.rstrip("/")
        self._cache = cache

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        system, root = self._system()
        paths = [f"{root}/{name}" for name in names]

        def fetch() -> dict[str, bytes]:
            # All at once where the file system can: hundreds of round trips would add up.
            if len(paths) == 1:
                return {paths[0]: system.cat_file(paths[0])}
            contents: dict[str, bytes] = system.cat(paths) if paths else {}
            return contents

        contents = patiently(partial(_attempt, f"the files of {self.address}", fetch))
        for path in paths:
            # Some file systems answer with the path in a form of their own, but in order.
            yield contents[path] if path in contents else contents[system._strip_protocol(path)]

    def find(self, name: str) -> bool:
        system, root = self._system()
        look = partial(system.exists, f"{root}/{name}")
        return bool(patiently(partial(_attempt, self.address, look)))

    def check(self, entry: ShardEntry) -> None:
        """Nothing: the cache holds every byte against the checksum when the shard arrives."""

    def open(self, entry: ShardEntry) -> IO[bytes]:
        name = f"{entry.name}.tar"

        def fetch() -> IO[bytes]:
            system, root = self._system()
            stream: IO[bytes] = system.open(f"{root}/{name}", "rb")
            return stream

        return self._cache.open(entry.sha256, entry.bytes, f"{self.address}/{name}", fetch)

    def _system(self) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            system, root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"corpus {self.address} cannot be reached: {reason}") from error
        return system, str(root).rstrip("/")


def read_shard(storage: Storage, entry: ShardEntry, read: Callable[[IO[bytes]], T]) -> T:
    """What `read` makes of a shard's open tar; both are tried again where storage stumbles."""

    def attempt() -> T:
        with storage.open(entry) as stream:
            try:
                return read(stream)
            except OSError as error:
                raise _unreadable(f"{storage.address}/{entry.name}.tar", error) from error

    return patiently(attempt)


def check_tar(tar: Path, entry: ShardEntry) -> None:
    """`UserError` where a shard's tar is absent or of another size."""
    if not _attempt(tar, tar.is_file):
        raise UserError(f"{tar} is missing")
    size = _attempt(tar, tar.stat).st_size
    if size != entry.bytes:
        raise UserError(f"{tar} has {size} bytes, and {entry.bytes} were written")


def _attempt(what: str | Path, read: Callable[[], T]) -> T:
    """What `read` returns; `UserError` where it fails, `UnreadableError` if it may go better."""
    try:
        return read()
    except _FINAL as error:
        raise UserError(str(_unreadable(what, error))) from error
    except Exception as error:
        raise _unreadable(what, error) from error


def _unreadable(what: str | Path, error: Exception) -> UnreadableError:
    strerror = error.strerror if isinstance(error, OSError) and isinstance(what, Path) else None
    reason = strerror or " ".join(str(error).split()) or type(error).__name__
    return UnreadableError(f"{what} cannot be read: {reason}")
