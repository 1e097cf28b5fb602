"""Several corpora of the same settings become one, without a token being written again."""

from __future__ import annotations

import contextlib
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shard_list import MOST_SHARDS, ShardEntry
from megatron_nuwa.data.shards import (
    CorpusManifest,
    Fingerprints,
    read_sidecar,
    shard_name,
    write_settings,
)
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sync
from megatron_nuwa.training.progress import track
from preprocessing.ledger import FAILURES_FILE
from preprocessing.repeated_ids import collected_ids
from preprocessing.whole_corpus import check_output, commit, made_whole, sound_manifest


def merge(corpora: Sequence[Path], output: Path) -> CorpusManifest:
    """Make one corpus of several, in their order; the shards are links to the same files.

    On another file system they are copies. Raises `UserError`, and writes nothing, where the
    corpora differ in a setting, which it names, or hold the same item.
    """
    if len(corpora) < 2:
        raise UserError("merge needs at least two corpora")
    check_output(output, "--output")
    manifests = [sound_manifest(folder) for folder in corpora]
    for folder, manifest in zip(corpora[1:], manifests[1:], strict=True):
        if manifests[0].has_sketches != manifest.has_sketches:
            pair = (folder, corpora[0]) if manifest.has_sketches else (corpora[0], folder)
            raise UserError(
                f"corpus {pair[0]} has sketches and {pair[1]} has none; only corpora that all "
                f"have them, or none of which has, can be merged"
            )
        field = _difference(manifests[0], manifest)
        if field:
            raise UserError(
                f"corpora {corpora[0]} and {folder} differ in {field}; only corpora of the same "
                f"settings can be merged"
            )
    count = sum(len(manifest.shards) for manifest in manifests)
    if count > MOST_SHARDS:
        raise UserError(f"the corpora have more than {MOST_SHARDS:,} shards together")
    _check_ids(corpora)
    with made_whole([output]) as [draft]:
        shards = (
            (folder, entry.name)
            for folder, manifest in zip(corpora, manifests, strict=True)
            for entry in manifest.shards
        )
        shards = track(shards, f"shards of {output} made", total=count)
        entries = (
            _take_over(folder, name, draft, number) for number, (folder, name) in enumerate(shards)
        )
        return commit(draft, manifests[0], entries, _failures(corpora))


def _take_over(folder: Path, name: str, draft: Path, number: int) -> ShardEntry:
    """Give the new corpus one shard under its new number."""
    new = shard_name(number)
    sidecar = read_sidecar(folder / f"{name}.json").model_copy(update={"shard": new})
    _link_or_copy(folder / f"{name}.tar", draft / f"{new}.tar")
    write_settings(draft / f"{new}.json", sidecar)
    return sidecar.entry()


def _link_or_copy(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(source.resolve(), target)
        return
    shutil.copyfile(source, target)
    sync(target)


def _difference(one: CorpusManifest, other: CorpusManifest) -> str:
    """The first setting that differs; empty where none does."""
    first, second = _settings(one), _settings(other)
    return next((name for name in first if first[name] != second[name]), "")


def _settings(manifest: CorpusManifest) -> dict[str, Any]:
    prints = {
        f"fingerprints.{name}": getattr(manifest.fingerprints, name)
        for name in Fingerprints.model_fields
    }
    names = ("grid", "frames_per_second", "codebook_size", "text_vocabulary_size")
    return {**prints, **{name: getattr(manifest, name) for name in names}}


def _check_ids(folders: Sequence[Path]) -> None:
    corpora = [Corpus(folder) for folder in folders]
    ends = list(accumulate(len(corpus) for corpus in corpora))

    def place(row: int) -> tuple[int, int]:
        number = bisect_right(ends, row)
        return number, row - (ends[number - 1] if number else 0)

    def name_of(row: int) -> str:
        number, index = place(row)
        return str(corpora[number].item(index)["id"])

    lines = (line for corpus in corpora for line in corpus.lines())
    with collected_ids() as ids:
        for line in track(lines, "ids compared", total=ends[-1]):
            ids.add(line["id"])
        pair = ids.first_repeat(name_of)
    if pair is not None:
        one, other = (folders[place(row)[0]] for row in pair)
        raise UserError(f"corpora {one} and {other} both hold the item {name_of(pair[1])!r}")


def _failures(corpora: Sequence[Path]) -> Iterator[str]:
    for folder in corpora:
        with (folder / FAILURES_FILE).open(encoding="utf-8", newline="\n") as lines:
            yield from (line.removesuffix("\n") for line in lines)
