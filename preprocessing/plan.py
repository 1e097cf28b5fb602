"""The manifest cut into shards, on disk, so that no rank ever holds all of it in memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.data.shards import read_json, shard_name, write_settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import written_atomically
from megatron_nuwa.training.progress import track
from preprocessing.item_json import item_of_tree, tree_of_item
from preprocessing.sources import SourceItem

PLAN_VERSION = 4
_STAMP = "plan.json"


@dataclass(frozen=True)
class PlannedItem:
    """A row of the manifest; `repeated` where an earlier row has its id."""

    row: int
    item: SourceItem
    repeated: bool


class PlanKey(Settings):
    """What a plan depends on."""

    plan_version: int = PLAN_VERSION
    source: str
    manifest_sha256: str
    items_per_shard: int = Field(ge=1)


class PlanStamp(Settings):
    """`plan.json`, the last file of a plan to appear."""

    key: PlanKey
    items: int = Field(ge=1)
    # How many of the items are shots, and of how many clips.
    shots: int = Field(ge=0)
    films: int = Field(ge=0)


class Plan:
    """The items of each shard, read from the plan's folder when they are needed."""

    def __init__(self, folder: Path, items_per_shard: int) -> None:
        self._folder = folder
        self._items_per_shard = items_per_shard

    def items(self, shard: int) -> list[PlannedItem]:
        """The items of one shard, in the manifest's order."""
        lines = (self._folder / f"{shard_name(shard)}.jsonl").read_bytes().splitlines()
        return [
            PlannedItem(entry["row"], item_of_tree(entry["item"]), entry["repeated"])
            for entry in map(json.loads, lines)
        ]

    def stamp(self, key: PlanKey) -> PlanStamp | None:
        """What a whole plan for the same manifest says of itself; None where there is none."""
        try:
            stamp = parse_settings(PlanStamp, read_json(self._folder / _STAMP), "the plan")
        except UserError:
            return None
        return stamp if stamp.key == key else None

    def write(self, items: Iterable[SourceItem], key: PlanKey, total: int | None = None) -> None:
        """Write the plan anew, of `total` items if that is known. Raises `OSError` as the disk."""
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True)
        hashes, films = array("Q"), array("Q")
        items = track(items, "rows cut into shards", total=total)
        for item in self._written(items, frozenset()):
            hashes.append(_hash(item.id))
            if item.shot is not None:
                films.append(_hash(item.uncut_id))
        values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
        suspects = frozenset(values[counts > 1].tolist())
        if suspects:
            planned = (
                entry.item
                for shard in range(-(-len(hashes) // self._items_per_shard))
                for entry in self.items(shard)
            )
            planned = track(planned, "repeated ids looked for", total=len(hashes))
            for _ in self._written(planned, suspects):
                pass
        stamp = PlanStamp(
            key=key,
            items=len(hashes),
            shots=len(films),
            films=len(np.unique(np.array(films, np.uint64))),
        )
        write_settings(self._folder / _STAMP, stamp)

    def _written(
        self, items: Iterable[SourceItem], suspects: frozenset[int]
    ) -> Iterator[SourceItem]:
        """Write and yield items; those whose id's hash is suspect are told from one another."""
        seen: set[str] = set()
        lines: list[bytes] = []
        shard = 0
        for row, item in enumerate(items):
            repeated = item.id in seen
            if suspects and _hash(item.id) in suspects:
                seen.add(item.id)
            entry = {"row": row, "item": tree_of_item(item), "repeated": repeated}
            lines.append(json.dumps(entry).encode() + b"\n")
            if len(lines) == self._items_per_shard:
                self._write_shard(shard, lines)
                shard, lines = shard + 1, []
            yield item
        if lines:
            self._write_shard(shard, lines)

    def _write_shard(self, shard: int, lines: list[bytes]) -> None:
        with written_atomically(self._folder / f"{shard_name(shard)}.jsonl") as stream:
            stream.writelines(lines)


def _hash(identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")
