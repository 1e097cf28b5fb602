"""Where a corpus lies: in a folder of this machine, or at an address of any fsspec file system."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import fsspec

from megatron_nuwa.data.cache import ShardCache
from megatron_nuwa.data.shards import ShardEntry
from megatron_nuwa.errors import UserError

# A path object folds the two slashes of an address into one.
_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)


class Storage(Protocol):
    """Reads the files of one corpus."""

    address: str
    is_remote: bool

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        """Contents of small files in their order; `UserError` naming the first that is absent."""

    def find(self, name: str) -> bool:
        """Whether there is such a file."""

    def check(self, entry: ShardEntry) -> None:
        """`UserError` where it is plain without reading that the tar is not the one listed."""

    def open(self, entry: ShardEntry) -> IO[bytes]:
        """The shard's tar as an open file of this machine."""


def storage_at(address: str | Path, cache: ShardCache | None = None) -> Storage:
    """The storage behind a path or an address such as `s3://bucket/corpora/vatex`.

    Shards from an address come through the cache, by default the one of the environment.
    """
    text = str(address)
    match = _ADDRESS.match(text)
    if match is None:
        return LocalFolder(Path(address))
    rest = text[match.end() :]
    root = "/" if match[1].lower() in ("file", "local") else ""
    return RemoteFolder(f"{match[1]}://{root}{rest}", cache or ShardCache.default())


class LocalFolder:
    """A folder of this machine."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = str(folder)

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        for name in names:
            path = self.folder / name
            try:
                yield path.read_bytes()
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def find(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def check(self, entry: ShardEntry) -> None:
        check_tar(self.folder / f"{entry.name}.tar", entry)

    def open(self, entry: ShardEntry) -> IO[bytes]:
        path = self.folder / f"{entry.name}.tar"
        try:
            return path.open("rb")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error


class RemoteFolder:
    """A folder of another file system, its shards brought into the cache when they are read."""

    is_remote = True

    def __init__(self, address: str, cache: ShardCache) -> None:
        self.address = address.rstrip("/")
        self._cache = cache

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        system, root = self._system()
        paths = [f"{root}/{name}" for name in names]
        try:
            # All at once where the file system can: hundreds of round trips would add up.
            contents = {path: system.cat_file(path) for path in paths[:1]}
            if len(paths) > 1:
                contents = system.cat(paths)
        except Exception as error:
            raise self._unreadable(f"the files of {self.address}", error) from error
        for path in paths:
            # Some file systems answer with the path in a form of their own, but in order.
            yield contents[path] if path in contents else contents[system._strip_protocol(path)]

    def find(self, name: str) -> bool:
        system, root = self._system()
        try:
            return bool(system.exists(f"{root}/{name}"))
        except Exception as error:
            raise self._unreadable(self.address, error) from error

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

    def _unreadable(self, what: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UserError(f"{what} cannot be read: {reason}")


def check_tar(tar: Path, entry: ShardEntry) -> None:
    """`UserError` where a shard's tar is absent or of another size."""
    if not tar.is_file():
        raise UserError(f"{tar} is missing")
    if tar.stat().st_size != entry.bytes:
        raise UserError(f"{tar} has {tar.stat().st_size} bytes, and {entry.bytes} were written")
