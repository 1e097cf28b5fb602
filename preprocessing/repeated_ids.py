"""Which rows of a long list share an id, without holding the ids: 16 bytes a row, on disk."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_nuwa.errors import UserError
from preprocessing.sources.items import hash_of_id

# Rows that are kept in memory, 64 MB; a billion rows make parts of that size.
_ROWS_AT_ONCE = 1 << 22
_PARTS = 256
_PART_BITS = np.uint64(56)


class Ids:
    """Ids in the order of their rows, of which hashes are kept, cut into parts by their hash."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hashes = array("Q")
        self._written = 0

    def add(self, name: str) -> None:
        """Take in the id of the next row."""
        self._hashes.append(hash_of_id(name))
        if len(self._hashes) == _ROWS_AT_ONCE:
            self._spill()

    def first_repeat(self, name_of: Callable[[int], str]) -> tuple[int, int] | None:
        """The first row whose id stands in an earlier row too: that one, and itself.

        `name_of` says the id of a row, since two ids may share a hash.
        """
        firsts = (next(_repeats(*part, name_of), None) for part in self._parts())
        return min((pair for pair in firsts if pair), key=lambda pair: pair[1], default=None)

    def repeats(self, name_of: Callable[[int], str]) -> Iterator[tuple[int, int]]:
        """All such rows, part by part."""
        for part in self._parts():
            yield from _repeats(*part, name_of)

    def _spill(self) -> None:
        hashes = np.frombuffer(self._hashes, np.uint64)
        rows = np.arange(self._written, self._written + len(hashes), dtype=np.uint64)
        parts = (hashes >> _PART_BITS).astype(np.int64)
        order = np.argsort(parts, kind="stable")
        ends = np.cumsum(np.bincount(parts, minlength=_PARTS))
        pairs = np.stack([hashes, rows], 1)[order]
        with _writing(self._folder):
            for part, own in enumerate(np.split(pairs, ends[:-1])):
                with (self._folder / str(part)).open("ab") as stream:
                    stream.write(own.tobytes())
        self._written += len(hashes)
        self._hashes = array("Q")

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Hashes and rows, ascending by row; equal hashes lie in one part."""
        if not self._written:
            yield np.array(self._hashes, np.uint64), np.arange(len(self._hashes), dtype=np.uint64)
            return
        if self._hashes:
            self._spill()
        for part in range(_PARTS):
            pairs = np.fromfile(self._folder / str(part), np.uint64).reshape(-1, 2)
            yield pairs[:, 0], pairs[:, 1]


@contextmanager
def collected_ids() -> Iterator[Ids]:
    """Ids whose parts lie in the system's folder for temporary files until the block ends."""
    with tempfile.TemporaryDirectory(prefix="ids-") as folder:
        yield Ids(Path(folder))


def _repeats(
    hashes: np.ndarray, rows: np.ndarray, name_of: Callable[[int], str]
) -> Iterator[tuple[int, int]]:
    """Pairs of rows with the same id, the first and a later one, ascending by the later one."""
    order = np.argsort(hashes, kind="stable")
    hashes, rows = hashes[order], rows[order]
    later = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    for place in later[np.argsort(rows[later])].tolist():
        row = int(rows[place])
        name = name_of(row)
        begin = int(np.searchsorted(hashes, hashes[place]))
        for earlier in map(int, rows[begin:place]):
            if name_of(earlier) == name:
                yield earlier, row
                break


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"temporary folder {folder.parent} cannot be written: {error.strerror or error}; "
            f"let TMPDIR name one with room for 16 bytes an item"
        ) from error
