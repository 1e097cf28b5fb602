"""Items and captions are read from their own places, and from no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shard_tar import ITEMS
from megatron_nuwa.data.shards import (
    CorpusManifest,
    Counts,
    Fingerprints,
    ShardItem,
    is_intact,
    read_sidecar,
    write_settings,
    write_shard,
)
from megatron_nuwa.errors import UserError

CELLS, CAPTIONS = 4, (2, 1, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Items with two, one and three captions; item n has the tokens n, its captions 10 n + c."""
    items = [
        ShardItem(
            id=f"item-{number}",
            visual=np.full(CELLS, number, np.uint16),
            text=np.stack([np.full(77, number * 10 + c, np.uint16) for c in range(captions)]),
            captions=tuple(f"caption {c}" for c in range(captions)),
            frames=1,
            media="x.png",
        )
        for number, captions in enumerate(CAPTIONS)
    ]
    sidecar = write_shard(tmp_path, 0, items)
    manifest = CorpusManifest(
        format_version=1,
        grid=(2, 2, 1),
        frames_per_second=None,
        codebook_size=8,
        text_vocabulary_size=100,
        fingerprints=Fingerprints(vqgan="v", bpe="b", decode="d"),
        counts=Counts(items=sidecar.items, captions=sidecar.captions, failed=0),
        shards=(sidecar.entry(),),
    )
    write_settings(tmp_path / "corpus.json", manifest)
    return tmp_path


@pytest.mark.parametrize("draw", [0.0, 0.4, 0.6, 1.0])
def test_every_draw_gives_a_caption_of_the_item(folder: Path, draw: float) -> None:
    # The largest of 2⁶⁴ draws is rounded to 1.
    every, text = np.arange(3), np.zeros((3, 77), np.int64)
    Corpus(folder).read_captions(every, np.full(3, draw), text, every)
    chosen = [min(int(draw * captions), captions - 1) for captions in CAPTIONS]
    assert text[:, 0].tolist() == [number * 10 + c for number, c in enumerate(chosen)]


@pytest.mark.parametrize("item", [-1, 3])
def test_items_that_there_are_not_are_refused(folder: Path, item: int) -> None:
    corpus, items, rows = Corpus(folder), np.array([0, item]), np.arange(2)
    reads: list[Callable[[], object]] = [
        lambda: corpus.read_visual(items, np.zeros((2, CELLS)), rows),
        lambda: corpus.read_captions(items, np.zeros(2), np.zeros((2, 77)), rows),
        lambda: corpus.texts(item),
        lambda: corpus.item(item),
    ]
    for read in reads:
        with pytest.raises(IndexError, match="must lie in 0 to 2"):
            read()


def test_another_number_of_items_than_the_shards_hold_is_named(folder: Path) -> None:
    path = folder / "corpus.json"
    tree = json.loads(path.read_text())
    tree["counts"]["items"] = 4
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="counts 4 items, but its shards hold 3"):
        Corpus(folder)


def test_captions_that_do_not_add_up_are_named(folder: Path) -> None:
    path = folder / "shard-000000.json"
    tree = json.loads(path.read_text())
    tree["groups"][0]["captions"] += 1
    tree["groups"][0]["members"]["text.npy"]["shape"][0] += 1
    tree["groups"][0]["members"]["text.npy"]["size"] += 2 * 77
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"shard-000000\.json: the groups' captions do not add up"):
        Corpus(folder)


@pytest.mark.parametrize(("item", "first"), [(0, 1), (1, 0), (2, 2), (2, 6)])
def test_captions_that_lie_elsewhere_are_named(folder: Path, item: int, first: int) -> None:
    lines = read_sidecar(folder / "shard-000000.json").groups[0].members[ITEMS]
    tar = folder / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    place = lines.offset
    for _ in range(item + 1):
        place = content.index(b'"first_caption": ', place) + len(b'"first_caption": ')
    content[place : place + 1] = str(first).encode()
    tar.write_bytes(content)
    corpus = Corpus(folder)
    with pytest.raises(UserError, match=r"items\.jsonl at byte \d+ does not match the sidecar"):
        corpus.texts(item)


def test_every_byte_of_the_layout_of_corpus_json_counts(folder: Path) -> None:
    content = (folder / "corpus.json").read_bytes()
    assert is_intact(content)
    for place in (content.index(b'"grid"'), content.index(b'"counts"'), len(content)):
        assert not is_intact(content[:place] + b" " + content[place:])
