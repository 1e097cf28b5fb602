"""Reading a token corpus: items by number, straight from memory-mapped shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_nuwa.config import parse_settings
from megatron_nuwa.data.cache import ShardCache
from megatron_nuwa.data.shard_tar import ITEMS, SKETCH, TEXT, TOKEN_DTYPE, VISUAL, Member
from megatron_nuwa.data.shards import (
    CORPUS_FILE,
    CorpusManifest,
    ShardEntry,
    Sidecar,
    parse_json,
    parse_manifest,
)
from megatron_nuwa.data.storage import check_tar, read_shard, storage_at
from megatron_nuwa.data.text import TEXT_TOKENS
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid

# Of all open corpora together. A map keeps a file descriptor, of which there must stay some for
# others; a map of a cached shard also keeps the bytes of a shard that has left the cache.
_MAPS = min(max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 64), 1 << 14)
_REMOTE_MAPS = 16
_ARRIVALS = 4
_open_corpora: weakref.WeakSet[Corpus] = weakref.WeakSet()
# Inside a caption the quotation marks are escaped, so that this finds the field alone.
_FIRST_CAPTION = re.compile(rb'"first_caption": (\d+)')


class Corpus:
    """The items of a finished corpus, numbered 0 to len − 1 in the manifest's order.

    `address` is a folder, or an address of any fsspec file system, whose shards are read through
    a cache of this machine. Per group of items it holds a few numbers, and nothing per item but
    the place of its captions, 4 bytes, once its group has been read. Raises `UserError` naming the
    file where the corpus is missing, foreign or half-written; `UnreadableError`, then or later,
    where several attempts to read failed.
    """

    def __init__(self, address: str | Path, cache: ShardCache | None = None) -> None:
        self._storage = storage_at(address, cache)
        self.address = self._storage.address
        self.path = Path(self.address)
        if not self._storage.find(CORPUS_FILE):
            raise UserError(
                f"corpus {self.address} is missing or unfinished: it has no {CORPUS_FILE}"
            )
        [content] = self._storage.read([CORPUS_FILE])
        self.manifest: CorpusManifest = parse_manifest(content, f"{self.address}/{CORPUS_FILE}")
        try:
            self.grid = Grid.of(self.manifest.grid)
        except ValueError as error:
            raise UserError(f"corpus {self.address}: {error}") from error
        self._index_groups()
        if len(self) != self.manifest.counts.items:
            raise UserError(
                f"corpus {self.address} counts {self.manifest.counts.items} items, "
                f"but its shards hold {len(self)}"
            )
        self._forget()

    def _index_groups(self) -> None:
        entries = self.manifest.shards
        sidecars = self._storage.read([f"{entry.name}.json" for entry in entries])
        rows: list[tuple[int, ...]] = []
        for shard, (entry, content) in enumerate(zip(entries, sidecars, strict=True)):
            file = f"{self.address}/{entry.name}.json"
            sidecar = checked_sidecar(content, file, entry, self.manifest, self.grid)
            self._storage.check(entry)
            for group in sidecar.groups:
                visual, text, items = (group.members[name] for name in (VISUAL, TEXT, ITEMS))
                sketch = group.members[SKETCH].offset if self.has_sketches else 0
                offsets = (visual.offset, text.offset, sketch, items.offset)
                rows.append((shard, group.items, group.captions, *offsets, items.size))
        columns = np.array(rows, np.int64).reshape(-1, 8).T
        self._shard, self._items, self._captions = columns[:3]
        self._visual_at, self._text_at, self._sketch_at = columns[3:6]
        self._lines_at, self._lines_size = columns[6:]
        self._starts = np.concatenate([[0], np.cumsum(self._items)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files itself; pickled maps would carry the corpus along.
        hidden = ("_maps", "_first_captions", "_lines", "_arriving", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._first_captions: dict[int, np.ndarray] = {}
        self._lines: tuple[int, list[bytes]] = (-1, [])
        self._arriving: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        _open_corpora.add(self)

    @property
    def is_remote(self) -> bool:
        """Whether its shards come from elsewhere, through the cache."""
        return self._storage.is_remote

    @property
    def has_sketches(self) -> bool:
        """Whether every item has a sketch; if not, none has."""
        return self.manifest.has_sketches

    @property
    def shard_sizes(self) -> list[int]:
        """Items of each shard, in the order of their numbers."""
        return [entry.items for entry in self.manifest.shards]

    def visual(self, index: int) -> np.ndarray:
        """An item's visual tokens in generation order: read-only uint16 (h·w·s,)."""
        return self._cells(index, self._visual_at)

    def sketch(self, index: int) -> np.ndarray:
        """An item's sketch, like its visual tokens; `ValueError` where items have none."""
        return self._cells(index, self._sketches())

    def texts(self, index: int) -> np.ndarray:
        """The tokens of all captions of an item: read-only uint16 (captions, 77)."""
        group, row = self._locate(index)
        first, end = self._bounds(group)[row : row + 2].tolist()
        place = self._text_at[group] + 2 * first * TEXT_TOKENS
        return self._tokens(group, place, (end - first) * TEXT_TOKENS).reshape(-1, TEXT_TOKENS)

    def read_visual(self, items: np.ndarray, target: np.ndarray, rows: np.ndarray) -> None:
        """Copy the items' visual tokens into the rows of `target` (…, h·w·s), of any int type."""
        self._read_cells(items, self._visual_at, target, rows)

    def read_sketches(self, items: np.ndarray, target: np.ndarray, rows: np.ndarray) -> None:
        """The same with the tokens of their sketches; `ValueError` where items have none."""
        self._read_cells(items, self._sketches(), target, rows)

    def read_captions(
        self, items: np.ndarray, draws: np.ndarray, target: np.ndarray, rows: np.ndarray
    ) -> None:
        """Copy one caption of each item, by its draw in [0, 1), into the rows of `target` (…, 77).

        The captions of an item are equally likely.
        """
        groups, inside = self._locate_all(items)
        bounds = [self._bounds(group) for group in groups.tolist()]
        pairs = zip(bounds, inside.tolist(), strict=True)
        edges = np.array([b[i : i + 2] for b, i in pairs], np.int64).reshape(-1, 2)
        chosen = edges[:, 0] + (draws * (edges[:, 1] - edges[:, 0])).astype(np.int64)
        # The largest draw is rounded to 1.
        captions = np.minimum(chosen, edges[:, 1] - 1)
        places = self._text_at[groups] // 2 + captions * TEXT_TOKENS
        columns = (rows.tolist(), self._shard[groups].tolist(), places.tolist())
        for row, shard, place in zip(*columns, strict=True):
            target[row] = self._mapped(shard)[place : place + TEXT_TOKENS]

    def item(self, index: int) -> dict[str, Any]:
        """An item's metadata: id, captions, first_caption, frames, media, start, end.

        Where the source told it, also provenance: who wrote each caption.
        """
        group, row = self._locate(index)
        if self._lines[0] != group:
            self._lines = (group, self._read_lines(group).splitlines())
        line: dict[str, Any] = json.loads(self._lines[1][row])
        return line

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Group by group: visual tokens (items, h·w·s) and text tokens (captions, 77), uint16."""
        for group, (items, captions) in enumerate(zip(self._items, self._captions, strict=True)):
            visual = self._tokens(group, self._visual_at[group], items * self.grid.cells)
            text = self._tokens(group, self._text_at[group], captions * TEXT_TOKENS)
            yield visual.reshape(items, -1), text.reshape(captions, -1)

    def visual_counts(self) -> np.ndarray:
        """How often each code occurs in the whole corpus: int64 (codebook_size,)."""
        return self._counts(self._visual_at, self.manifest.codebook_size, "visual")

    def sketch_counts(self) -> np.ndarray:
        """The same of the sketches' codes: int64 (sketch_codebook_size,)."""
        return self._counts(self._sketches(), self.manifest.sketch_codebook_size or 0, "sketch")

    def expect(self, items: np.ndarray) -> None:
        """Have the shards of items that will be read soon brought here meanwhile.

        Does nothing for a folder of this machine. What goes wrong shows when the shard is read.
        """
        if not self.is_remote:
            return
        if self._arriving is None:
            self._arriving = ThreadPoolExecutor(_ARRIVALS, thread_name_prefix="shards")
        for shard in np.unique(self._shard[self._locate_all(items)[0]]).tolist():
            if shard not in self._maps:
                self._arriving.submit(self._mapped, shard)

    def _sketches(self) -> np.ndarray:
        if not self.has_sketches:
            raise ValueError(f"corpus {self.address} has no sketches")
        return self._sketch_at

    def _counts(self, starts: np.ndarray, codes: int, kind: str) -> np.ndarray:
        counts = np.zeros(codes, np.int64)
        for group, items in enumerate(self._items):
            tokens = self._tokens(group, starts[group], items * self.grid.cells)
            found = np.bincount(tokens, minlength=codes)
            if len(found) > codes:
                raise UserError(
                    f"corpus {self.address} holds the {kind} token {len(found) - 1}, and its "
                    f"codebook has {codes} codes"
                )
            counts += found
        return counts

    def _cells(self, index: int, starts: np.ndarray) -> np.ndarray:
        group, row = self._locate(index)
        cells = self.grid.cells
        return self._tokens(group, starts[group] + 2 * row * cells, cells)

    def _read_cells(
        self, items: np.ndarray, starts: np.ndarray, target: np.ndarray, rows: np.ndarray
    ) -> None:
        groups, inside = self._locate_all(items)
        cells = self.grid.cells
        places = starts[groups] // 2 + inside * cells
        columns = (rows.tolist(), self._shard[groups].tolist(), places.tolist())
        for row, shard, place in zip(*columns, strict=True):
            target[row] = self._mapped(shard)[place : place + cells]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0 to {len(self) - 1}, not {index}")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, int(index - self._starts[group])

    def _locate_all(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(items) and not 0 <= items.min() <= items.max() < len(self):
            raise IndexError(f"items must lie in 0 to {len(self) - 1}")
        groups = np.searchsorted(self._starts, items, side="right") - 1
        return groups, items - self._starts[groups]

    def _tokens(self, group: int, place: int, count: int) -> np.ndarray:
        start = int(place) // 2
        return self._mapped(int(self._shard[group]))[start : start + int(count)]

    def _mapped(self, shard: int) -> np.ndarray:
        """A shard's tar as uint16, which its arrays start on whole numbers of."""
        try:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        except KeyError:
            return self._map(shard)

    def _map(self, shard: int) -> np.ndarray:
        entry = self.manifest.shards[shard]
        # Pages that storage fails to deliver later are beyond any handling: the process dies of
        # SIGBUS, and the run is one that may be started again.
        tokens = read_shard(self._storage, entry, _map_tokens)
        most = _REMOTE_MAPS if self.is_remote else max(1, _MAPS // len(_open_corpora))
        with self._lock:
            self._maps[shard] = tokens
            while len(self._maps) > most:
                self._maps.popitem(last=False)
        return tokens

    def _bounds(self, group: int) -> np.ndarray:
        """Which captions belong to which item of a group: uint32 (items + 1,)."""
        bounds = self._first_captions.get(group)
        if bounds is None:
            bounds = self._first_captions[group] = self._read_bounds(group)
        return bounds

    def _read_bounds(self, group: int) -> np.ndarray:
        items, captions = int(self._items[group]), int(self._captions[group])
        found = _FIRST_CAPTION.findall(self._read_lines(group))
        bounds = np.array([*map(int, found), captions], np.int64)
        if len(found) != items or bounds[0] != 0 or (np.diff(bounds) < 1).any():
            name = self.manifest.shards[self._shard[group]].name
            raise UserError(
                f"{self.address}/{name}.tar: its {ITEMS} at byte {self._lines_at[group]} does not "
                f"match the sidecar"
            )
        return bounds.astype(np.uint32)

    def _read_lines(self, group: int) -> bytes:
        entry = self.manifest.shards[self._shard[group]]
        size, place = int(self._lines_size[group]), int(self._lines_at[group])
        # Not through the map: what is read once would stay in the process's resident memory.
        return read_shard(self._storage, entry, lambda s: os.pread(s.fileno(), size, place))


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


def _map_tokens(stream: IO[bytes]) -> np.ndarray:
    return np.memmap(stream, TOKEN_DTYPE, mode="r").view(np.ndarray)


def _fits(member: Member, shape: tuple[int, int] | None, tar_bytes: int) -> bool:
    if member.offset + member.size > tar_bytes or member.shape != shape:
        return False
    if shape is None:
        return True
    whole = member.offset % TOKEN_DTYPE.itemsize == 0 and member.dtype == TOKEN_DTYPE.str
    return whole and member.size == shape[0] * shape[1] * TOKEN_DTYPE.itemsize
