"""Where a corpus's groups lie in its shards; a sidecar is read when its shard is."""

from __future__ import annotations

import hashlib
import threading
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nuwa.config import parse_settings
from megatron_nuwa.data.shard_list import ShardEntry, ShardList
from megatron_nuwa.data.shard_tar import ITEMS, SKETCH, TEXT, TOKEN_DTYPE, VISUAL, Member
from megatron_nuwa.data.shards import CorpusManifest, Sidecar, parse_json
from megatron_nuwa.data.storage import Storage, check_tar
from megatron_nuwa.data.text import TEXT_TOKENS
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid

# Sidecars that are read when a corpus is opened, spread over all shards: of an ordinary corpus
# every one, and of a huge one so many that half a copy of it is noticed before the training.
CHECKED_AT_OPENING = 4096
_FEWEST_GROUPS = 64


class Column(IntEnum):
    """What is known of a group: its shard, its first item, its counts, its places in the tar.

    `SKETCH` is 0 where there are none; `LINES` are those of metadata, of `LINES_SIZE` bytes.
    """

    SHARD = 0
    START = 1
    ITEMS = 2
    CAPTIONS = 3
    VISUAL = 4
    TEXT = 5
    SKETCH = 6
    LINES = 7
    LINES_SIZE = 8


class GroupIndex:
    """The numbers of each group of items, for the groups of the shards that have been read.

    Groups are numbered in the order in which their shards are read. Threads may share an index.
    """

    def __init__(self, storage: Storage, manifest: CorpusManifest, grid: Grid) -> None:
        self._storage, self._grid = storage, grid
        self._shards = ShardList.of(manifest.shards)
        # Of the manifest only what sidecars are held against.
        self._manifest = manifest.model_copy(update={"shards": ()})
        self._shard_starts = np.concatenate([[0], np.cumsum(self._shards.items)])
        self._first = np.full(len(self._shards), -1, np.int32)
        self._groups = np.zeros(len(self._shards), np.int32)
        self._columns = np.zeros((len(Column), _FEWEST_GROUPS), np.int64)
        self._count, self._is_even = 0, True
        self._lock = threading.Lock()
        shards = np.unique(np.linspace(0, len(self._shards) - 1, CHECKED_AT_OPENING, dtype=int))
        self._read(shards.tolist() if len(self._shards) else [])

    def __len__(self) -> int:
        """Items of the corpus."""
        return int(self._shard_starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def column(self, column: Column) -> np.ndarray:
        """One number of every group that has been read, at the group's number: int64.

        What was asked for before items were located may lack their groups.
        """
        return self._columns[column]

    def locate(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The groups of items of the corpus, and their places in these; reads what it needs."""
        shards = self.shards_of(items)
        first = self._first[shards]
        if len(first) and first.min() < 0:
            self._read(np.unique(shards[first < 0]).tolist())
            first = self._first[shards]
        columns = self._columns
        if not self._is_even:
            return self._located_one_by_one(items, shards)
        groups = first + (items - self._shard_starts[shards]) // columns[Column.ITEMS][first]
        return groups, items - columns[Column.START][groups]

    def shards_of(self, items: np.ndarray) -> np.ndarray:
        """The shards that items of the corpus lie in; reads nothing."""
        return np.searchsorted(self._shard_starts, items, side="right") - 1

    def groups_of(self, shard: int) -> range:
        """The groups of a shard, in their order."""
        if self._first[shard] < 0:
            self._read([shard])
        first = int(self._first[shard])
        return range(first, first + int(self._groups[shard]))

    def _located_one_by_one(
        self, items: np.ndarray, shards: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        groups = np.empty(len(items), np.int64)
        for place, (item, shard) in enumerate(zip(items.tolist(), shards.tolist(), strict=True)):
            own = self.groups_of(shard)
            starts = self._columns[Column.START][own.start : own.stop]
            groups[place] = own.start + np.searchsorted(starts, item, side="right") - 1
        return groups, items - self._columns[Column.START][groups]

    def _read(self, shards: list[int]) -> None:
        contents = self._storage.read([f"{self._shards.name(shard)}.json" for shard in shards])
        for shard, content in zip(shards, contents, strict=True):
            entry = self._shards[shard]
            file = f"{self._storage.address}/{entry.name}.json"
            sidecar = checked_sidecar(content, file, entry, self._manifest, self._grid)
            self._storage.check(entry)
            self._add(shard, sidecar)

    def _add(self, shard: int, sidecar: Sidecar) -> None:
        items = np.array([group.items for group in sidecar.groups], np.int64)
        rows = []
        for group in sidecar.groups:
            places = [group.members[name].offset for name in (VISUAL, TEXT)]
            sketch = group.members[SKETCH].offset if SKETCH in group.members else 0
            lines = group.members[ITEMS]
            rows.append((group.captions, *places, sketch, lines.offset, lines.size))
        with self._lock:
            # Another thread may have read it meanwhile.
            if self._first[shard] >= 0:
                return
            first, end = self._count, self._count + len(rows)
            self._make_room(end)
            new = self._columns[:, first:end]
            new[Column.SHARD] = shard
            new[Column.START] = self._shard_starts[shard] + np.cumsum(items) - items
            new[Column.ITEMS] = items
            new[Column.CAPTIONS :] = np.array(rows, np.int64).T
            self._count = end
            self._is_even &= bool((items[:-1] == items[0]).all() and items[-1] <= items[0])
            self._groups[shard] = len(rows)
            # Last, since readers look here without the lock.
            self._first[shard] = first

    def _make_room(self, groups: int) -> None:
        held = self._columns.shape[1]
        if groups > held:
            # A new array: another thread may be reading the old one.
            larger = np.zeros((len(Column), max(groups, held * 3 // 2)), np.int64)
            larger[:, : self._count] = self._columns[:, : self._count]
            self._columns = larger


def checked_sidecar(
    content: bytes, file: str, entry: ShardEntry, manifest: CorpusManifest, grid: Grid
) -> Sidecar:
    """A shard's sidecar from its bytes, held against its entry in `corpus.json`.

    Raises `UserError` naming the file where it does not fit.
    """
    sidecar = parse_settings(Sidecar, parse_json(content, file), file)
    same = ("items", "captions", "bytes", "sha256")
    if sidecar.shard != entry.name or any(getattr(sidecar, f) != getattr(entry, f) for f in same):
        raise UserError(f"{file} does not match the entry of {entry.name} in corpus.json")
    for group in sidecar.groups:
        cells, words = (group.items, grid.cells), (group.captions, TEXT_TOKENS)
        for name in (*manifest.arrays, ITEMS):
            shape = None if name == ITEMS else words if name == TEXT else cells
            member = group.members.get(name)
            if member is None or not _fits(member, shape, entry.bytes):
                raise UserError(f"{file}: member {group.key}.{name} is wrong or missing")
        if SKETCH in group.members and not manifest.has_sketches:
            raise UserError(f"{file} has sketches, and corpus.json says that there are none")
    for field in ("items", "captions"):
        if sum(getattr(group, field) for group in sidecar.groups) != getattr(sidecar, field):
            raise UserError(f"{file}: the groups' {field} do not add up")
    if entry.sidecar_sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(f"{file} has other bytes than were written (its sha256 differs)")
    return sidecar


def check_shard(tar: Path, entry: ShardEntry, manifest: CorpusManifest, grid: Grid) -> Sidecar:
    """Hold a shard's `corpus.json` entry, sidecar and file size against each other.

    Returns the sidecar. Raises `UserError` naming the file that does not fit.
    """
    file = tar.with_suffix(".json")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    sidecar = checked_sidecar(content, str(file), entry, manifest, grid)
    check_tar(tar, entry)
    return sidecar


def _fits(member: Member, shape: tuple[int, int] | None, tar_bytes: int) -> bool:
    if member.offset + member.size > tar_bytes or member.shape != shape:
        return False
    if shape is None:
        return True
    whole = member.offset % TOKEN_DTYPE.itemsize == 0 and member.dtype == TOKEN_DTYPE.str
    return whole and member.size == shape[0] * shape[1] * TOKEN_DTYPE.itemsize
