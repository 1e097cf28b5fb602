"""Reading a token corpus: items by number, straight from memory-mapped shards."""

from __future__ import annotations

import json
import os
import re
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_nuwa.data.cache import ShardCache
from megatron_nuwa.data.caption_bounds import CaptionBounds
from megatron_nuwa.data.group_index import Column, GroupIndex
from megatron_nuwa.data.shard_list import ShardList
from megatron_nuwa.data.shard_tar import ITEMS, TOKEN_DTYPE
from megatron_nuwa.data.shards import CORPUS_FILE, CorpusManifest, parse_manifest
from megatron_nuwa.data.storage import read_shard, storage_at
from megatron_nuwa.data.text import TEXT_TOKENS
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid

# Of all open corpora together. A map keeps a file descriptor, of which there must stay some for
# others; a map of a cached shard also keeps the bytes of a shard that has left the cache.
_MAPS = min(max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 64), 1 << 14)
_REMOTE_MAPS = 16
# Of all open corpora together: 2 bytes an item that has several captions.
_BOUNDS_BYTES = 256 << 20
_ARRIVALS = 4
_open_corpora: weakref.WeakSet[Corpus] = weakref.WeakSet()
Tell = Callable[[int], object]
# Inside a caption the quotation marks are escaped, so that this finds the field alone.
_FIRST_CAPTION = re.compile(rb'"first_caption": (\d+)')


class Corpus:
    """The items of a finished corpus, numbered 0 to len − 1 in the manifest's order.

    `address` is a folder, or an address of any fsspec file system, whose shards are read through
    a cache of this machine. Raises `UserError` naming the file where the corpus is missing,
    foreign or half-written, of a corpus of very many shards maybe only when one of them is read;
    `UnreadableError`, then or later, where several attempts to read failed. It holds some 100 bytes
    a shard, and some 70 a group of items once its shard has been read; of single items only where
    their captions are, up to a bound.
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
        self.index = GroupIndex(self._storage, self.manifest, self.grid)
        self._shards = ShardList.of(self.manifest.shards)
        if len(self) != self.manifest.counts.items:
            raise UserError(
                f"corpus {self.address} counts {self.manifest.counts.items} items, "
                f"but its shards hold {len(self)}"
            )
        self._forget()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files itself; pickled maps would carry the corpus along.
        hidden = ("_maps", "_bounds", "_lines", "_arriving", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bounds = CaptionBounds(self._group_counts, self._read_bounds, _most_bounds_bytes)
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
    def shard_sizes(self) -> np.ndarray:
        """Items of each shard, in the order of their numbers: int64 (shards,)."""
        return self._shards.items

    def visual(self, index: int) -> np.ndarray:
        """An item's visual tokens in generation order: read-only uint16 (h·w·s,)."""
        return self._cells(index, Column.VISUAL)

    def sketch(self, index: int) -> np.ndarray:
        """An item's sketch, like its visual tokens; `ValueError` where items have none."""
        return self._cells(index, self._sketches())

    def texts(self, index: int) -> np.ndarray:
        """The tokens of all captions of an item: read-only uint16 (captions, 77)."""
        group, row = self._locate(index)
        first, end = self._bounds.of(group)[row : row + 2].tolist()
        tokens = self._tokens(group, Column.TEXT, first * TEXT_TOKENS, (end - first) * TEXT_TOKENS)
        return tokens.reshape(-1, TEXT_TOKENS)

    def read_visual(self, items: np.ndarray, target: np.ndarray, rows: np.ndarray) -> None:
        """Copy the items' visual tokens into the rows of `target` (…, h·w·s), of any int type."""
        self._read_cells(items, Column.VISUAL, target, rows)

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
        bounds = [self._bounds.of(group) for group in groups.tolist()]
        pairs = zip(bounds, inside.tolist(), strict=True)
        edges = np.array([b[i : i + 2] for b, i in pairs], np.int64).reshape(-1, 2)
        chosen = edges[:, 0] + (draws * (edges[:, 1] - edges[:, 0])).astype(np.int64)
        # The largest draw is rounded to 1.
        captions = np.minimum(chosen, edges[:, 1] - 1)
        places = self.index.column(Column.TEXT)[groups] // 2 + captions * TEXT_TOKENS
        columns = (rows.tolist(), self.index.column(Column.SHARD)[groups].tolist(), places.tolist())
        for row, shard, place in zip(*columns, strict=True):
            target[row] = self._mapped(shard)[place : place + TEXT_TOKENS]

    def item(self, index: int) -> dict[str, Any]:
        """An item's metadata: id, captions, first_caption, frames, media, start, end.

        Where the source told it, also provenance: who wrote each caption; where a short clip was
        sampled faster than the corpus is, also frames_per_second.
        """
        group, row = self._locate(index)
        if self._lines[0] != group:
            self._lines = (group, self._split_lines(group))
        line: dict[str, Any] = json.loads(self._lines[1][row])
        return line

    def lines(self) -> Iterator[dict[str, Any]]:
        """The metadata of all items, in order: what `item` returns of each."""
        for group in self._group_numbers():
            yield from map(json.loads, self._split_lines(group))

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Group by group: visual tokens (items, h·w·s) and text tokens (captions, 77), uint16."""
        for group in self._group_numbers():
            items, captions = self._group_counts(group)
            visual = self._tokens(group, Column.VISUAL, 0, items * self.grid.cells)
            text = self._tokens(group, Column.TEXT, 0, captions * TEXT_TOKENS)
            yield visual.reshape(items, -1), text.reshape(captions, -1)

    def visual_counts(self, tell: Tell = lambda items: None) -> np.ndarray:
        """How often each code occurs in the whole corpus: int64 (codebook_size,).

        `tell` is told again and again how many more items have been counted.
        """
        return self._counts(Column.VISUAL, self.manifest.codebook_size, "visual", tell)

    def sketch_counts(self, tell: Tell = lambda items: None) -> np.ndarray:
        """The same of the sketches' codes: int64 (sketch_codebook_size,)."""
        codes = self.manifest.sketch_codebook_size or 0
        return self._counts(self._sketches(), codes, "sketch", tell)

    def expect(self, items: np.ndarray) -> None:
        """Have the shards of items that will be read soon brought here meanwhile.

        Does nothing for a folder of this machine. What goes wrong shows when the shard is read.
        """
        if not self.is_remote:
            return
        if self._arriving is None:
            self._arriving = ThreadPoolExecutor(_ARRIVALS, thread_name_prefix="shards")
        self._check(items)
        for shard in np.unique(self.index.shards_of(items)).tolist():
            if shard not in self._maps:
                self._arriving.submit(self._bring, shard)

    def _sketches(self) -> Column:
        if not self.has_sketches:
            raise ValueError(f"corpus {self.address} has no sketches")
        return Column.SKETCH

    def _counts(self, kind: Column, codes: int, noun: str, tell: Tell) -> np.ndarray:
        counts = np.zeros(codes, np.int64)
        for group in self._group_numbers():
            items = self._of(group, Column.ITEMS)
            tokens = self._tokens(group, kind, 0, items * self.grid.cells)
            found = np.bincount(tokens, minlength=codes)
            if len(found) > codes:
                raise UserError(
                    f"corpus {self.address} holds the {noun} token {len(found) - 1}, and its "
                    f"codebook has {codes} codes"
                )
            counts += found
            tell(items)
        return counts

    def _cells(self, index: int, kind: Column) -> np.ndarray:
        group, row = self._locate(index)
        cells = self.grid.cells
        return self._tokens(group, kind, row * cells, cells)

    def _read_cells(
        self, items: np.ndarray, kind: Column, target: np.ndarray, rows: np.ndarray
    ) -> None:
        groups, inside = self._locate_all(items)
        cells = self.grid.cells
        places = self.index.column(kind)[groups] // 2 + inside * cells
        columns = (rows.tolist(), self.index.column(Column.SHARD)[groups].tolist(), places.tolist())
        for row, shard, place in zip(*columns, strict=True):
            target[row] = self._mapped(shard)[place : place + cells]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0 to {len(self) - 1}, not {index}")
        groups, inside = self.index.locate(np.array([index]))
        return int(groups[0]), int(inside[0])

    def _locate_all(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._check(items)
        return self.index.locate(items)

    def _check(self, items: np.ndarray) -> None:
        if len(items) and not 0 <= items.min() <= items.max() < len(self):
            raise IndexError(f"items must lie in 0 to {len(self) - 1}")

    def _group_numbers(self) -> Iterator[int]:
        """The numbers of all groups, in the order of their items."""
        for shard in range(len(self._shards)):
            yield from self.index.groups_of(shard)

    def _of(self, group: int, column: Column) -> int:
        return int(self.index.column(column)[group])

    def _tokens(self, group: int, kind: Column, first: int, count: int) -> np.ndarray:
        start = self._of(group, kind) // 2 + first
        return self._mapped(self._of(group, Column.SHARD))[start : start + count]

    def _bring(self, shard: int) -> None:
        self.index.groups_of(shard)
        self._mapped(shard)

    def _mapped(self, shard: int) -> np.ndarray:
        """A shard's tar as uint16, which its arrays start on whole numbers of."""
        try:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        except KeyError:
            return self._map(shard)

    def _map(self, shard: int) -> np.ndarray:
        # Pages that storage fails to deliver later are beyond any handling: the process dies of
        # SIGBUS, and the run is one that may be started again.
        tokens = read_shard(self._storage, self._shards[shard], _map_tokens)
        most = _REMOTE_MAPS if self.is_remote else max(1, _MAPS // len(_open_corpora))
        with self._lock:
            self._maps[shard] = tokens
            while len(self._maps) > most:
                self._maps.popitem(last=False)
        return tokens

    def _group_counts(self, group: int) -> tuple[int, int]:
        return self._of(group, Column.ITEMS), self._of(group, Column.CAPTIONS)

    def _read_bounds(self, group: int) -> np.ndarray:
        items, captions = self._group_counts(group)
        found = _FIRST_CAPTION.findall(self._read_lines(group))
        bounds = np.array([*map(int, found), captions], np.int64)
        if len(found) != items or bounds[0] != 0 or (np.diff(bounds) < 1).any():
            raise self._mismatch(group)
        return bounds

    def _split_lines(self, group: int) -> list[bytes]:
        lines = self._read_lines(group).splitlines()
        if len(lines) != self._of(group, Column.ITEMS):
            raise self._mismatch(group)
        return lines

    def _mismatch(self, group: int) -> UserError:
        name = self._shards.name(self._of(group, Column.SHARD))
        place = self._of(group, Column.LINES)
        return UserError(
            f"{self.address}/{name}.tar: its {ITEMS} at byte {place} does not match the sidecar"
        )

    def _read_lines(self, group: int) -> bytes:
        entry = self._shards[self._of(group, Column.SHARD)]
        place, size = self._of(group, Column.LINES), self._of(group, Column.LINES_SIZE)
        # Not through the map: what is read once would stay in the process's resident memory.
        return read_shard(self._storage, entry, lambda s: os.pread(s.fileno(), size, place))


def _map_tokens(stream: IO[bytes]) -> np.ndarray:
    return np.memmap(stream, TOKEN_DTYPE, mode="r").view(np.ndarray)


def _most_bounds_bytes() -> int:
    return _BOUNDS_BYTES // max(1, len(_open_corpora))
