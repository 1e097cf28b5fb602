"""Items of a corpus in the making, and the sequence that every kind of source is."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from preprocessing.sources.locations import Location


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar: its bytes lie at `offset`. A size of -1 says that there is none.

    `name` is what a corpus calls it: `raw_name`, which the tar has, without a "./" at its beginning
    and with its suffixes in lower case.
    """

    tar: Location
    name: str
    raw_name: str
    offset: int
    size: int

    def __str__(self) -> str:
        """The address at which fsspec finds it."""
        return f"tar://{self.raw_name}::{self.tar}"


Media = Path | str | TarMember


@dataclass(frozen=True)
class SourceItem:
    """One image, or one clip from `start` to `end` seconds of a video, with its captions.

    Media and sketch are local paths, fsspec addresses (str) or members of tars. `provenance` says
    who wrote each caption: "original", the name of a captioning model, or None where nobody knows.
    `shot` is the number of a shot within the clip that `shots` has cut it from; None where the item
    is no such shot.
    """

    id: str
    media: Media
    captions: tuple[str, ...]
    start: float | None = None
    end: float | None = None
    sketch: Media | None = None
    provenance: tuple[str | None, ...] | None = None
    shot: int | None = None

    @property
    def uncut_id(self) -> str:
        """The id of what the item is a shot of; its own where it is none."""
        return self.id if self.shot is None else self.id.removesuffix(f"#{self.shot}")


class Source(Sequence[SourceItem]):
    """Items by row, read when they are asked for: what is held is a few bytes a row.

    Can be pickled; `folder` is what media are named relative to.
    """

    folder: Location
    _fingerprint: str

    def __init__(self, id_hashes: array[int]) -> None:
        self._id_hashes = id_hashes

    @property
    def fingerprint(self) -> str:
        """The sha256 of all that decides the items (not of the media)."""
        return self._fingerprint

    @abstractmethod
    def item(self, row: int) -> SourceItem:
        """The item of a row from 0 to `len(self) - 1`."""

    def __len__(self) -> int:
        return len(self._id_hashes)

    @overload
    def __getitem__(self, row: int) -> SourceItem: ...

    @overload
    def __getitem__(self, row: slice) -> list[SourceItem]: ...

    def __getitem__(self, row: int | slice) -> SourceItem | list[SourceItem]:
        if isinstance(row, slice):
            return [self.item(each) for each in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self.item(row % len(self))

    def repeated_rows(self) -> set[int]:
        """Rows whose id stands in an earlier row too."""
        hashes = np.array(self._id_hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        suspects = np.unique(np.concatenate([order[same], order[same + 1]]))
        seen: set[str] = set()
        repeated = set()
        # In order of the rows, so that the first keeps its id; two ids may share a hash.
        for row in suspects.tolist():
            name = self.item(row).id
            if name in seen:
                repeated.add(row)
            seen.add(name)
        return repeated


def hash_of_id(name: str) -> int:
    """64 bits of an id."""
    content = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class Texts:
    """Many short texts in one buffer."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text at the end."""
        self._bytes += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __getitem__(self, row: int) -> str:
        content = self._bytes[self._ends[row] : self._ends[row + 1]]
        return content.decode("utf-8", "surrogateescape")

    def __len__(self) -> int:
        return len(self._ends) - 1


def media_name(media: Media, folder: Location) -> str:
    """How a corpus names a medium: relative to the source's folder where it lies in it.

    Also where only one of the two was spelled from the root, or the folder with a slash at its end.
    """
    if isinstance(media, TarMember):
        return f"tar://{media.name}::{media_name(media.tar, folder)}"
    if isinstance(media, Path):
        if isinstance(folder, Path) and media.absolute().is_relative_to(folder.absolute()):
            media = media.absolute().relative_to(folder.absolute())
        return media.as_posix()
    return media.removeprefix(f"{str(folder).rstrip('/')}/")
