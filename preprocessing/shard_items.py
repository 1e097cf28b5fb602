"""Items read back from shards, also from those of a corpus that is not finished."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nuwa.data.shard_tar import ITEMS, SKETCH, TEXT, VISUAL, Group, ShardItem
from megatron_nuwa.data.shards import Sidecar


def shard_item(
    line: Mapping[str, Any], visual: np.ndarray, text: np.ndarray, sketch: np.ndarray | None = None
) -> ShardItem:
    """The item of a metadata line; `visual` and `sketch` (h·w·s,), `text` (captions, 77)."""
    provenance, hashes = line.get("provenance"), line.get("perceptual_hashes")
    return ShardItem(
        id=line["id"],
        visual=visual,
        text=text,
        captions=tuple(line["captions"]),
        frames=line["frames"],
        media=line["media"],
        start=line["start"],
        end=line["end"],
        provenance=None if provenance is None else tuple(provenance),
        perceptual_hashes=None if hashes is None else tuple(hashes),
        sketch=sketch,
        frames_per_second=line.get("frames_per_second"),
    )


def read_items(folder: Path, sidecar: Sidecar) -> Iterator[ShardItem]:
    """All items of a shard, in their order."""
    for group in sidecar.groups:
        visual = _array(folder, sidecar, group, VISUAL)
        text = _array(folder, sidecar, group, TEXT)
        sketches = _array(folder, sidecar, group, SKETCH) if SKETCH in group.members else None
        for place, line in enumerate(_lines(folder, sidecar, group)):
            first = line["first_caption"]
            captions = text[first : first + len(line["captions"])]
            sketch = None if sketches is None else sketches[place]
            yield shard_item(line, visual[place], captions, sketch)


def read_lines(folder: Path, sidecar: Sidecar) -> Iterator[dict[str, Any]]:
    """The metadata of all items of a shard, in their order; the tokens are not read."""
    for group in sidecar.groups:
        yield from _lines(folder, sidecar, group)


def _lines(folder: Path, sidecar: Sidecar, group: Group) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in _content(folder, sidecar, group, ITEMS).splitlines())


def _array(folder: Path, sidecar: Sidecar, group: Group, name: str) -> np.ndarray:
    member = group.members[name]
    assert member.shape is not None
    content = _content(folder, sidecar, group, name)
    return np.frombuffer(content, member.dtype).reshape(member.shape).astype(np.uint16)


def _content(folder: Path, sidecar: Sidecar, group: Group, name: str) -> bytes:
    member = group.members[name]
    with (folder / f"{sidecar.shard}.tar").open("rb") as stream:
        stream.seek(member.offset)
        return stream.read(member.size)
