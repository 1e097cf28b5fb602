"""Near-duplicates: found among all items of a corpus once they are encoded, and taken out.

Which items look alike depends on all of them, so no shard can know it alone. Hashes stay in the
shards, also those of items that were taken out: a farm that ends amid this finds the same again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from preprocessing.filters import NEAR_DUPLICATES, FilteredError, NearDuplicates
from preprocessing.shard_items import read_items, read_lines


@dataclass(frozen=True)
class _Look:
    """An item's id and its perceptual hashes."""

    id: str
    hashes: tuple[str, ...]


def hashes_as_text(hashes: np.ndarray) -> tuple[str, ...]:
    """Perceptual hashes, uint64, as a corpus keeps them."""
    return tuple(f"{int(each):016x}" for each in hashes)


def take_out_duplicates(folder: Path, shards: int, rule: NearDuplicates) -> int:
    """Write the shards that hold near-duplicates anew without them; returns how many there are.

    Takes a folder whose shards are all complete. What it leaves is the same for every order of
    work and after every interruption. Holds about a kilobyte an item in memory.
    """
    looks: list[_Look] = []
    starts = [0]
    for shard in range(shards):
        looks += _looks(folder, _sidecar(folder, shard))
        starts.append(len(looks))
    if not looks:
        return 0
    hashes = np.array([[int(text, 16) for text in look.hashes] for look in looks], np.uint64)
    found = rule.duplicates(hashes)
    for shard in range(shards):
        start, end = starts[shard : shard + 2]
        wanted = {
            row - start: _failure(row - start, looks[row], looks[found[row]])
            for row in range(start, end)
            if row in found
        }
        _rewrite(folder, shard, wanted)
    return len(found)


def _failure(place: int, look: _Look, original: _Look) -> Failure:
    reason = FilteredError(NEAR_DUPLICATES, f"item {look.id!r}: looks like item {original.id!r}")
    duplicate = Duplicate(place=place, perceptual_hashes=look.hashes)
    return Failure(id=look.id, reason=str(reason), filter=NEAR_DUPLICATES, duplicate=duplicate)


def _rewrite(folder: Path, shard: int, wanted: Mapping[int, Failure]) -> None:
    sidecar = _sidecar(folder, shard)
    others = [failure for failure in sidecar.failures if failure.duplicate is None]
    duplicates = [wanted[place] for place in sorted(wanted)]
    if tuple(others + duplicates) == sidecar.failures:
        return
    gone = _places(sidecar)
    if not gone.keys() <= wanted.keys():
        raise AssertionError(f"shard {sidecar.shard} has lost items that belong to the corpus")
    places = [place for place in range(len(gone) + sidecar.items) if place not in gone]
    items = zip(places, read_items(folder, sidecar), strict=True)
    kept = [item for place, item in items if place not in wanted]
    # Without its sidecar a shard is incomplete: tar and sidecar cannot change at once.
    (folder / f"{sidecar.shard}.json").unlink()
    write_shard(folder, shard, kept, others + duplicates)


def _sidecar(folder: Path, shard: int) -> Sidecar:
    return read_sidecar(folder / f"{shard_name(shard)}.json")


def _places(sidecar: Sidecar) -> dict[int, _Look]:
    """The near-duplicates that a shard has lost already, by their places."""
    return {
        failure.duplicate.place: _Look(failure.id, failure.duplicate.perceptual_hashes)
        for failure in sidecar.failures
        if failure.duplicate is not None
    }


def _looks(folder: Path, sidecar: Sidecar) -> Iterator[_Look]:
    """All items of a shard that have been encoded, those taken out included, in their order."""
    gone = _places(sidecar)
    there = (
        _Look(line["id"], tuple(line["perceptual_hashes"])) for line in read_lines(folder, sidecar)
    )
    for place in range(len(gone) + sidecar.items):
        yield gone[place] if place in gone else next(there)
