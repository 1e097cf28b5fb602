"""Near-duplicates: found among all items of a corpus once they are encoded, and taken out.

Which items look alike depends on all of them, so no shard can know it alone. Hashes stay in the
shards, also those of items that were taken out: a farm that ends amid this finds the same again.
"""

from __future__ import annotations

import io
import json
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_nuwa.data.shards import (
    Duplicate,
    Failure,
    Sidecar,
    read_sidecar,
    shard_name,
    write_shard,
)
from megatron_nuwa.errors import UserError
from preprocessing.communicator import Communicator, on_every_rank, on_first_rank
from preprocessing.filters import NEAR_DUPLICATES, FilteredError, NearDuplicates
from preprocessing.look_alikes import originals_of
from preprocessing.shard_items import read_items, read_lines
from preprocessing.state import writing

# Shards whose ids are kept at hand.
_SHARDS_AT_HAND = 64


def hashes_as_text(hashes: np.ndarray) -> tuple[str, ...]:
    """Perceptual hashes, uint64, as a corpus keeps them."""
    return tuple(f"{int(each):016x}" for each in hashes)


def take_out_duplicates(
    corpus: Path, notes: Path, shards: int, rule: NearDuplicates, communicator: Communicator
) -> None:
    """Write the shards that hold near-duplicates anew without them; every rank makes this call.

    Takes a folder whose shards are all complete. What it leaves is the same for every number of
    ranks, every order of work and after every interruption. The ranks read and write shards side
    by side and leave notes for one another in the folder `notes`, which is removed at the end; the
    first one compares, and holds about 200 bytes an item in memory.
    """
    mine = range(communicator.rank, shards, communicator.size)
    looks = _Looks(notes, shards)

    def note() -> None:
        with writing(corpus):
            notes.mkdir(exist_ok=True)
            for shard in mine:
                looks.write(shard, corpus)

    def rewrite() -> None:
        with writing(corpus):
            _reopen_wronged(corpus, mine, looks)
            for shard in mine:
                _rewrite(corpus, shard, looks.duplicates(shard))

    def compare() -> None:
        with writing(corpus):
            print("looking for near-duplicates", flush=True)
            looks.compare(rule.distance)

    on_every_rank(communicator, note)
    on_first_rank(communicator, compare)
    on_every_rank(communicator, rewrite)
    on_first_rank(communicator, lambda: shutil.rmtree(notes, ignore_errors=True))


class _Looks:
    """Notes on all items that have been encoded, those taken out included, shard by shard."""

    def __init__(self, folder: Path, shards: int) -> None:
        self._folder, self._shards = folder, shards
        self._ids = lru_cache(_SHARDS_AT_HAND)(self._read_ids)
        self._starts: list[int] = []

    def write(self, shard: int, corpus: Path) -> None:
        """Note the ids and hashes of a shard's items."""
        sidecar = _sidecar(corpus, shard)
        gone = _gone(sidecar)
        lines = (
            (line["id"], tuple(line["perceptual_hashes"])) for line in read_lines(corpus, sidecar)
        )
        there = [
            gone[place] if place in gone else next(lines)
            for place in range(len(gone) + sidecar.items)
        ]
        hashes = [[int(text, 16) for text in texts] for _, texts in there]
        _save(self._file(shard, "hashes.npy"), np.array(hashes, np.uint64))
        ids = json.dumps([name for name, _ in there])
        self._file(shard, "ids.json").write_text(ids, encoding="utf-8")

    def compare(self, distance: int) -> None:
        """Note which items look like an earlier one."""
        each = [np.load(self._file(shard, "hashes.npy")) for shard in range(self._shards)]
        starts = np.cumsum([0, *(len(hashes) for hashes in each)])
        there = [hashes for hashes in each if len(hashes)]
        found = originals_of(np.concatenate(there), distance) if there else np.empty(0, np.int64)
        _save(self._folder / "starts.npy", starts)
        _save(self._folder / "originals.npy", found)

    def duplicates(self, shard: int) -> dict[int, Failure]:
        """By their places, the items of a shard that look like an earlier one of the corpus."""
        if not self._starts:
            self._starts = np.load(self._folder / "starts.npy").tolist()
        start, end = self._starts[shard : shard + 2]
        originals = np.load(self._folder / "originals.npy", mmap_mode="r")[start:end]
        places = np.flatnonzero(originals >= 0).tolist()
        if not places:
            return {}
        hashes = np.load(self._file(shard, "hashes.npy"))
        return {
            place: _failure(
                place, self._ids(shard)[place], hashes[place], self._id_of(int(originals[place]))
            )
            for place in places
        }

    def _id_of(self, row: int) -> str:
        shard = bisect_right(self._starts, row) - 1
        return self._ids(shard)[row - self._starts[shard]]

    def _read_ids(self, shard: int) -> list[str]:
        ids: list[str] = json.loads(self._file(shard, "ids.json").read_text(encoding="utf-8"))
        return ids

    def _file(self, shard: int, what: str) -> Path:
        return self._folder / f"{shard_name(shard)}.{what}"


def _save(path: Path, array: np.ndarray) -> None:
    # Not np.save to a file: where the disk is full it says how much was written, and not why.
    content = io.BytesIO()
    np.save(content, array)
    path.write_bytes(content.getbuffer())


def _failure(place: int, name: str, hashes: np.ndarray, original: str) -> Failure:
    reason = FilteredError(NEAR_DUPLICATES, f"item {name!r}: looks like item {original!r}")
    duplicate = Duplicate(place=place, perceptual_hashes=hashes_as_text(hashes))
    return Failure(id=name, reason=str(reason), filter=NEAR_DUPLICATES, duplicate=duplicate)


def _reopen_wronged(corpus: Path, shards: Iterable[int], looks: _Looks) -> None:
    """Have shards made anew that have lost items which belong to the corpus after all.

    What they looked like has failed since, where its shard was lost amid being rewritten. Raises
    `UserError` where there are any.
    """
    wronged = []
    for shard in shards:
        sidecar = _sidecar(corpus, shard)
        gone = _gone(sidecar)
        if gone and gone.keys() - looks.duplicates(shard).keys():
            (corpus / f"{sidecar.shard}.json").unlink()
            wronged.append(sidecar.shard)
    if wronged:
        raise UserError(
            f"{', '.join(wronged)}: items that looked like others which have failed since are to "
            "be encoded again; repeat the command"
        )


def _rewrite(corpus: Path, shard: int, wanted: Mapping[int, Failure]) -> None:
    sidecar = _sidecar(corpus, shard)
    others = [failure for failure in sidecar.failures if failure.duplicate is None]
    duplicates = [wanted[place] for place in sorted(wanted)]
    if tuple(others + duplicates) == sidecar.failures:
        return
    gone = _gone(sidecar)
    places = [place for place in range(len(gone) + sidecar.items) if place not in gone]
    items = zip(places, read_items(corpus, sidecar), strict=True)
    kept = [item for place, item in items if place not in wanted]
    # Without its sidecar a shard is incomplete: tar and sidecar cannot change at once.
    (corpus / f"{sidecar.shard}.json").unlink()
    write_shard(corpus, shard, kept, others + duplicates)


def _sidecar(corpus: Path, shard: int) -> Sidecar:
    return read_sidecar(corpus / f"{shard_name(shard)}.json")


def _gone(sidecar: Sidecar) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Ids and hashes of the near-duplicates that a shard has lost already, by their places."""
    return {
        failure.duplicate.place: (failure.id, failure.duplicate.perceptual_hashes)
        for failure in sidecar.failures
        if failure.duplicate is not None
    }
