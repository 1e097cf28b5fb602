"""One corpus becomes two, for training and held out, with no video on both sides."""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shard_list import ShardEntry
from megatron_nuwa.data.shards import CorpusManifest, write_shard
from megatron_nuwa.errors import UserError
from megatron_nuwa.training.progress import track
from preprocessing.shard_items import shard_item
from preprocessing.whole_corpus import check_output, commit, made_whole, sound_manifest

# Items whose numbers are held at a time.
_AT_ONCE = 1 << 16


def split(
    folder: Path, held_out: float, output_train: Path, output_heldout: Path
) -> tuple[CorpusManifest, CorpusManifest]:
    """Divide a corpus by a hash of each item's media path; returns the two manifests.

    The path alone decides, so that other clips of the same video fall on the same side, also in
    other corpora and when the corpus grows. Raises `UserError`, and writes nothing, where one side
    would be empty.
    """
    if not 0 < held_out < 1:
        raise UserError(f"--held-out must lie between 0 and 1, not {held_out:g}")
    if output_train.resolve() == output_heldout.resolve():
        raise UserError("--output-train and --output-heldout must be different folders")
    check_output(output_train, "--output-train")
    check_output(output_heldout, "--output-heldout")
    manifest = sound_manifest(folder)
    corpus = Corpus(folder)
    lines = track(corpus.lines(), f"items of {folder} divided", total=len(corpus))
    is_held = np.fromiter((is_held_out(line["media"], held_out) for line in lines), bool)
    for name, side in (("training", ~is_held), ("held-out", is_held)):
        if not side.any():
            raise UserError(
                f"the {name} side of corpus {folder} would be empty with --held-out {held_out:g}; "
                f"it takes whole media files, and the corpus has too few"
            )
    with made_whole([output_train, output_heldout]) as drafts:
        sides = zip(drafts, (output_train, output_heldout), (~is_held, is_held), strict=True)
        train, held = (
            commit(draft, manifest, _write_side(draft, corpus, side, f"items of {output} written"))
            for draft, output, side in sides
        )
        return train, held


def is_held_out(media: str, share: float) -> bool:
    """Whether the items of a media file belong to the held-out share of all files."""
    digest = hashlib.sha256(posixpath.normpath(media).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * (1 << 64)


def _write_side(
    folder: Path, corpus: Corpus, side: np.ndarray, description: str
) -> Iterator[ShardEntry]:
    items_per_shard = int(corpus.shard_sizes.max())
    items = (
        shard_item(
            corpus.item(index),
            corpus.visual(index),
            corpus.texts(index),
            corpus.sketch(index) if corpus.has_sketches else None,
        )
        for start in range(0, len(side), _AT_ONCE)
        for index in (start + np.flatnonzero(side[start : start + _AT_ONCE])).tolist()
    )
    items = track(items, description, total=int(side.sum()))
    for number in itertools.count():
        part = list(islice(items, items_per_shard))
        if not part:
            return
        yield write_shard(folder, number, part).entry()
