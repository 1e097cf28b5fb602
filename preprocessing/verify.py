"""Checking a corpus: sizes and sums at once, every byte and token on request."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.group_index import check_shard
from megatron_nuwa.data.shard_list import ShardList
from megatron_nuwa.data.shard_tar import ITEMS
from megatron_nuwa.data.shards import (
    CORPUS_FILE,
    CorpusManifest,
    ShardEntry,
    Sidecar,
    is_intact,
    read_manifest,
)
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sha256_of
from megatron_nuwa.grid import Grid
from megatron_nuwa.training.progress import track
from preprocessing.ledger import FAILURES_FILE
from preprocessing.repeated_ids import collected_ids

ITEM_FIELDS = {"id", "captions", "first_caption", "frames", "media", "start", "end"}
OPTIONAL_FIELDS = {"provenance", "perceptual_hashes", "frames_per_second"}


def find_damage(folder: Path, full: bool = False) -> list[str]:
    """What is wrong with a corpus: sentences naming the file, none for a good corpus.

    Every file but the tars is held against its checksum, the tars against their sizes. `full`
    reads every byte: sha256 sums, array headers, token ranges and counts. Raises `UserError` where
    there is no corpus to check.
    """
    try:
        manifest = read_manifest(folder)
        grid = Grid.of(manifest.grid)
    except (UserError, ValueError) as error:
        if not (folder / CORPUS_FILE).is_file():
            raise
        return [str(error) if isinstance(error, UserError) else f"{folder / CORPUS_FILE}: {error}"]
    damage = [*_sums(folder, manifest), *_other_files(folder, manifest)]
    for entry in track(manifest.shards, f"shards of {folder} checked"):
        try:
            sidecar = check_shard(folder / f"{entry.name}.tar", entry, manifest, grid)
            if full:
                damage += _shard_damage(folder, entry, sidecar, manifest)
        except UserError as error:
            damage.append(str(error))
    if full and not damage:
        damage += _item_damage(folder)
    return damage


def _other_files(folder: Path, manifest: CorpusManifest) -> Iterator[str]:
    names = sorted(manifest.files)
    for path in (folder / name for name in names):
        try:
            if sha256_of(path) != manifest.files[path.name]:
                yield f"{path} has other bytes than were written (its sha256 differs)"
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"
    path = folder / CORPUS_FILE
    if not is_intact(path.read_bytes()):
        yield f"{path} has other bytes than were written (its sha256 differs)"


def _sums(folder: Path, manifest: CorpusManifest) -> Iterator[str]:
    shards = ShardList.of(manifest.shards)
    for field in ("items", "captions"):
        total = shards.total(field)
        if total != getattr(manifest.counts, field):
            yield (
                f"{folder / 'corpus.json'} counts {getattr(manifest.counts, field)} {field}, "
                f"but its shards add up to {total}"
            )
    tars = {path.name for path in folder.glob("*.tar")}
    for name in sorted(tars.difference(f"{entry.name}.tar" for entry in shards)):
        yield f"{folder / name} is not listed in corpus.json"
    try:
        with (folder / FAILURES_FILE).open("rb") as lines:
            listed = sum(1 for _ in lines)
    except OSError as error:
        yield f"{folder / FAILURES_FILE} cannot be read: {error.strerror}"
    else:
        counted = manifest.counts.failed + sum(manifest.counts.left_out.values())
        if listed != counted:
            yield (
                f"{folder / FAILURES_FILE} holds {listed} items, and corpus.json counts {counted} "
                f"that failed or were left out"
            )


def _shard_damage(
    folder: Path, entry: ShardEntry, sidecar: Sidecar, manifest: CorpusManifest
) -> Iterator[str]:
    tar_path = folder / f"{entry.name}.tar"
    if sha256_of(tar_path) != entry.sha256:
        yield f"{tar_path} has other bytes than were written (its sha256 differs)"
        return
    limits = manifest.arrays
    expected = [f"{group.key}.{name}" for group in sidecar.groups for name in (*limits, ITEMS)]
    with tarfile.open(tar_path) as tar:
        if tar.getnames() != expected:
            yield f"{tar_path} holds other members than its sidecar lists"
            return
        for group in sidecar.groups:
            for name, limit in limits.items():
                content = tar.extractfile(f"{group.key}.{name}")
                assert content is not None
                array = np.load(io.BytesIO(content.read()), allow_pickle=False)
                member = group.members[name]
                start = tar.getmember(f"{group.key}.{name}").offset_data
                header = tar.getmember(f"{group.key}.{name}").size - member.size
                if array.shape != member.shape or start + header != member.offset:
                    yield f"{tar_path}: member {group.key}.{name} does not match the sidecar"
                elif array.max() >= limit:
                    yield (
                        f"{tar_path}: member {group.key}.{name} holds the token {array.max()}, "
                        f"and there are only {limit}"
                    )


def _item_damage(folder: Path) -> Iterator[str]:
    corpus = Corpus(folder)
    with collected_ids() as ids:
        lines = corpus.lines()
        for index in track(range(len(corpus)), f"items of {folder} checked"):
            try:
                item = next(lines)
            except (UserError, json.JSONDecodeError) as error:
                yield f"corpus {folder}, item {index}: {error}"
                return
            if not _is_complete(item, len(corpus.texts(index))):
                yield f"corpus {folder}, item {index} has other fields or captions than it should"
            elif not 1 <= item["frames"] <= corpus.grid.s:
                yield (
                    f"corpus {folder}, item {index} counts {item['frames']} of {corpus.grid.s} "
                    f"frames"
                )
            ids.add(str(item.get("id")))
        for _, row in ids.repeats(lambda row: str(corpus.item(row).get("id"))):
            yield f"corpus {folder} holds the id {corpus.item(row).get('id')!r} twice"


def _is_complete(item: dict[str, Any], captions: int) -> bool:
    if set(item) - OPTIONAL_FIELDS != ITEM_FIELDS or len(item["captions"]) != captions:
        return False
    return "provenance" not in item or len(item["provenance"]) == captions
