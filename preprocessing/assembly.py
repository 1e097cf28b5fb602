"""A shard in the making: decoded items come in any order, batches and bytes are always the same.

A batch holds the frames of consecutive rows of the manifest, and their sketches. Where an item has
failed its frames are black and its maps of class 0, so that an item's tokens depend neither on the
order of work nor on its neighbours' luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_nuwa.data.shards import Failure, ShardItem, write_shard
from preprocessing.decode_worker import DecodedItem
from preprocessing.duplicates import hashes_as_text
from preprocessing.ledger import CorpusSettings
from preprocessing.plan import PlannedItem
from preprocessing.sources import media_name
from preprocessing.sources.locations import Location
from preprocessing.state import writing


@dataclass(frozen=True)
class _Made:
    """What is kept of an item while its frames are encoded."""

    text: np.ndarray
    real: int
    hashes: np.ndarray | None
    rate: float | None


class ShardAssembly:
    """Gathers what the items of one shard have become, and writes the shard."""

    def __init__(
        self,
        shard: int,
        planned: Sequence[PlannedItem],
        settings: CorpusSettings,
        media_folder: Location,
    ) -> None:
        self.shard = shard
        self.planned = planned
        self._settings = settings
        self._media_folder = media_folder
        size = settings.items_per_batch
        self._batches = [
            range(start, min(start + size, len(planned))) for start in range(0, len(planned), size)
        ]
        self._missing = [len(batch) for batch in self._batches]
        self._unencoded = len(self._batches)
        self._frames: dict[int, np.ndarray] = {}
        self._maps: dict[int, np.ndarray] = {}
        self._items: dict[int, ShardItem] = {}
        self._made: dict[int, _Made] = {}
        self._failures: dict[int, Failure] = {}

    def take(self, index: int, decoded: DecodedItem) -> int | None:
        """Take what item `index` of the shard has become; the batch that it completes, if any."""
        if decoded.frames is None or decoded.text is None:
            item = self.planned[index].item
            self._failures[index] = Failure(
                id=item.id, reason=str(decoded.reason), filter=decoded.filter
            )
        else:
            self._frames[index] = decoded.frames
            if decoded.maps is not None:
                self._maps[index] = decoded.maps
            self._made[index] = _Made(decoded.text, decoded.real, decoded.hashes, decoded.rate)
        batch = index // self._settings.items_per_batch
        self._missing[batch] -= 1
        return None if self._missing[batch] else batch

    def items_in(self, batch: int) -> int:
        """How many items, failed ones included, a batch is made of."""
        return len(self._batches[batch])

    def frames(self, batch: int) -> np.ndarray | None:
        """Take out a complete batch's frames, uint8 (frames, H, W, 3); None where all failed."""
        return _taken_out(self._frames, self._batches[batch])

    def maps(self, batch: int) -> np.ndarray | None:
        """The same with the maps of its sketches, uint8 (frames, H, W); None without sketches."""
        return _taken_out(self._maps, self._batches[batch])

    def put(
        self, batch: int, tokens: np.ndarray | None, sketches: np.ndarray | None = None
    ) -> bool:
        """Put in a batch's tokens, uint16 (frames, h, w); true where it was the shard's last."""
        self._unencoded -= 1
        if tokens is not None:
            rows, maps = self._rows(tokens), None if sketches is None else self._rows(sketches)
            for place, index in enumerate(self._batches[batch]):
                if index in self._made:
                    sketch = None if maps is None else maps[place]
                    self._items[index] = self._item(index, rows[place], sketch)
        return not self._unencoded

    def _rows(self, tokens: np.ndarray) -> np.ndarray:
        """(frames, h, w) → one row of frame-major tokens for each item: generation order."""
        return tokens.reshape(-1, self._settings.decode.frames * tokens[0].size)

    def write(self, folder: Path) -> None:
        """Write the shard; `MachineError` where the disk refuses."""
        with writing(folder):
            write_shard(
                folder,
                self.shard,
                [self._items[index] for index in sorted(self._items)],
                [self._failures[index] for index in sorted(self._failures)],
            )

    def _item(self, index: int, visual: np.ndarray, sketch: np.ndarray | None) -> ShardItem:
        item = self.planned[index].item
        made = self._made.pop(index)
        return ShardItem(
            id=item.id,
            visual=visual,
            text=made.text,
            captions=item.captions,
            frames=made.real,
            media=media_name(item.media, self._media_folder),
            start=item.start,
            end=item.end,
            provenance=item.provenance,
            perceptual_hashes=None if made.hashes is None else hashes_as_text(made.hashes),
            sketch=sketch,
            frames_per_second=made.rate,
        )


def _taken_out(held: dict[int, np.ndarray], indices: range) -> np.ndarray | None:
    """What is held of consecutive items, joined; zeros stand for those that have failed."""
    found = {index: held.pop(index) for index in indices if index in held}
    if not found:
        return None
    shape = next(iter(found.values())).shape
    joined = np.zeros((len(indices), *shape), np.uint8)
    for index, clip in found.items():
        joined[index - indices.start] = clip
    return joined.reshape(-1, *shape[1:])
