"""Shards and the corpus that reads them."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nuwa.data import corpus as corpus_module
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shard_tar import ITEMS, SKETCH, TEXT, VISUAL
from megatron_nuwa.data.shards import (
    CorpusManifest,
    Counts,
    Failure,
    Fingerprints,
    ShardItem,
    read_sidecar,
    write_settings,
    write_shard,
)
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid

CODES, WORDS, SKETCH_CODES = 50, 1000, 20
BEFORE_SKETCHES = "409dc4fb5e36014a5e4bc85418f4771b09320e586d751582ed761bd302c67cbd"


def random_items(seed: int, count: int, grid: Grid, sketches: bool = False) -> list[ShardItem]:
    generator = np.random.default_rng(seed)
    items = []
    for number in range(count):
        captions = int(generator.integers(1, 6))
        items.append(
            ShardItem(
                id=f"item-{seed}-{number}",
                visual=generator.integers(0, CODES, grid.cells, np.uint16),
                text=generator.integers(0, WORDS, (captions, 77), np.uint16),
                captions=tuple(f'caption {n} é\u2028\n"{seed}"' for n in range(captions)),
                frames=int(generator.integers(1, grid.s + 1)),
                media=f"média/{number}.mp4",
                start=None if number % 2 else float(generator.random()),
                end=None,
            )
        )
    if sketches:
        maps = generator.integers(0, SKETCH_CODES, (count, grid.cells), np.uint16)
        items = [replace(item, sketch=own) for item, own in zip(items, maps, strict=True)]
    return items


def write_corpus(
    folder: Path, grid: Grid, shards: list[list[ShardItem]], group_items: int = 1024
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sketches = any(item.sketch is not None for items in shards for item in items)
    sidecars = [
        write_shard(folder, number, items, group_items=group_items)
        for number, items in enumerate(shards)
    ]
    manifest = CorpusManifest(
        format_version=1,
        grid=tuple(grid),
        frames_per_second=None if grid.s == 1 else 2.5,
        codebook_size=CODES,
        sketch_codebook_size=SKETCH_CODES if sketches else None,
        text_vocabulary_size=WORDS,
        fingerprints=Fingerprints(vqgan="v", bpe="b", decode="d", sketch="s" if sketches else None),
        counts=Counts(
            items=sum(sidecar.items for sidecar in sidecars),
            captions=sum(sidecar.captions for sidecar in sidecars),
            failed=0,
        ),
        shards=tuple(sidecar.entry() for sidecar in sidecars if sidecar.items),
    )
    write_settings(folder / "corpus.json", manifest)
    return folder


GRIDS = st.builds(Grid, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))


@settings(max_examples=25, deadline=None)
@given(
    grid=GRIDS,
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    group_items=st.integers(1, 5),
    seed=st.integers(0, 99),
    sketches=st.booleans(),
)
def test_every_item_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    grid: Grid,
    sizes: list[int],
    group_items: int,
    seed: int,
    sketches: bool,
) -> None:
    shards = [random_items(seed + n, size, grid, sketches) for n, size in enumerate(sizes)]
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), grid, shards, group_items)
    corpus = Corpus(folder)
    items = [item for shard in shards for item in shard]
    assert len(corpus) == len(items)
    assert corpus.grid == grid
    for index in reversed(range(len(items))):
        item, line = items[index], corpus.item(index)
        np.testing.assert_array_equal(corpus.visual(index), item.visual)
        np.testing.assert_array_equal(corpus.texts(index), item.text)
        assert tuple(line["captions"]) == item.captions
        assert (line["id"], line["frames"]) == (item.id, item.frames)
        assert (line["media"], line["start"], line["end"]) == (item.media, item.start, item.end)
    counts = np.bincount(np.concatenate([item.visual for item in items]), minlength=CODES)
    np.testing.assert_array_equal(corpus.visual_counts(), counts)
    assert corpus.has_sketches == sketches
    every, rows = np.arange(len(items)), np.full((len(items), grid.cells), -1)
    if sketches:
        maps = np.array([item.sketch for item in items])
        corpus.read_sketches(every[::-1], rows, every[::-1])
        np.testing.assert_array_equal(rows, maps)
        np.testing.assert_array_equal([corpus.sketch(index) for index in every], maps)
        counts = np.bincount(maps.ravel(), minlength=SKETCH_CODES)
        np.testing.assert_array_equal(corpus.sketch_counts(), counts)
    else:
        for read in (lambda: corpus.sketch(0), lambda: corpus.read_sketches(every, rows, every)):
            with pytest.raises(ValueError, match="has no sketches"):
                read()
    for index in (-1, len(items)):
        with pytest.raises(IndexError):
            corpus.visual(index)


@pytest.mark.parametrize(("count", "groups"), [(1023, 1), (1024, 1), (1025, 2), (2048, 2)])
def test_groups_hold_at_most_1024_items(tmp_path: Path, count: int, groups: int) -> None:
    grid = Grid(1, 2, 1)
    items = random_items(0, count, grid)
    corpus = Corpus(write_corpus(tmp_path, grid, [items]))
    assert len(read_sidecar(tmp_path / "shard-000000.json").groups) == groups
    for index in {0, 1022, min(1024, count - 1), count - 1}:
        np.testing.assert_array_equal(corpus.visual(index), items[index].visual)
        np.testing.assert_array_equal(corpus.texts(index), items[index].text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return nine_items(tmp_path / "corpus")


def nine_items(folder: Path, sketches: bool = False) -> Path:
    grid = Grid(2, 3, 2)
    shards = [random_items(1, 5, grid, sketches), random_items(2, 4, grid, sketches)]
    return write_corpus(folder, grid, shards, group_items=2)


@pytest.mark.parametrize("sketches", [False, True])
def test_stock_webdataset_reads_the_tars(tmp_path: Path, sketches: bool) -> None:
    folder = nine_items(tmp_path / "corpus", sketches)
    corpus = Corpus(folder)
    urls = [f"file:{folder / name}.tar" for name in ("shard-000000", "shard-000001")]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
    index = 0
    for sample in dataset:
        first = 0
        for row, line in enumerate(sample[ITEMS].decode().splitlines()):
            item = json.loads(line)
            captions = len(item["captions"])
            np.testing.assert_array_equal(sample[VISUAL][row], corpus.visual(index))
            if sketches:
                np.testing.assert_array_equal(sample[SKETCH][row], corpus.sketch(index))
            np.testing.assert_array_equal(
                sample[TEXT][first : first + captions], corpus.texts(index)
            )
            assert item == corpus.item(index)
            first += captions
            index += 1
    assert index == len(corpus) == 9


def test_mapped_arrays_equal_the_members_that_tarfile_reads(folder: Path) -> None:
    sidecar = read_sidecar(folder / "shard-000000.json")
    raw = (folder / "shard-000000.tar").read_bytes()
    with tarfile.open(folder / "shard-000000.tar") as tar:
        names = [
            f"{group.key}.{name}" for group in sidecar.groups for name in (VISUAL, TEXT, ITEMS)
        ]
        assert tar.getnames() == names
        for header in tar.getmembers():
            assert (header.mtime, header.uid, header.gid, header.uname) == (0, 0, 0, "")
        for group in sidecar.groups:
            for name, member in group.members.items():
                stream = tar.extractfile(f"{group.key}.{name}")
                assert stream is not None
                content = stream.read()
                mapped = raw[member.offset : member.offset + member.size]
                if name == ITEMS:
                    assert mapped == content
                else:
                    array = np.load(io.BytesIO(content))
                    assert array.shape == member.shape
                    assert array.dtype == np.uint16
                    assert mapped == array.tobytes()


def test_same_items_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = nine_items(tmp_path / "again")
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_a_corpus_without_sketches_has_the_bytes_that_it_had_before_there_were_any(
    folder: Path,
) -> None:
    """Those of the last version whose corpora could have none."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    assert digest.hexdigest() == BEFORE_SKETCHES


def test_a_worker_process_gets_the_path_and_not_the_tokens(folder: Path) -> None:
    corpus = Corpus(folder)
    expected = corpus.visual(7).copy()
    state = pickle.dumps(corpus)
    assert expected.tobytes() not in state
    np.testing.assert_array_equal(pickle.loads(state).visual(7), expected)


def test_all_open_corpora_together_keep_few_files_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "_MAPS", 8)
    monkeypatch.setattr(corpus_module, "_open_corpora", weakref.WeakSet())
    grid = Grid(2, 2, 1)
    corpora = []
    for number in range(4):
        shards = [random_items(10 * number + shard, 2, grid) for shard in range(5)]
        corpora.append(Corpus(write_corpus(tmp_path / str(number), grid, shards)))
    for _ in range(2):
        for corpus in corpora:
            for index in range(len(corpus)):
                corpus.visual(index)
    assert sum(len(corpus._maps) for corpus in corpora) <= 8


def test_tokens_cannot_be_written_to(folder: Path) -> None:
    for tokens in (Corpus(folder).visual(0), Corpus(folder).texts(0)):
        with pytest.raises(ValueError, match="read-only"):
            tokens[...] = 0


def test_groups_without_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group_items must be at least 1, not 0"):
        write_shard(tmp_path, 0, random_items(0, 1, Grid(2, 2, 1)), group_items=0)


def test_shard_without_items_is_a_sidecar_of_failures(tmp_path: Path) -> None:
    (tmp_path / "shard-000003.tar").write_bytes(b"from an earlier run")
    write_shard(tmp_path, 3, [], [Failure(id="a", reason="it is empty")])
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000003.json"]
    assert read_sidecar(tmp_path / "shard-000003.json").failures[0].reason == "it is empty"


def test_a_shard_has_all_sketches_or_none_and_corpus_json_knows(tmp_path: Path) -> None:
    items = random_items(0, 3, Grid(2, 2, 1), sketches=True)
    mixed = [*items[:2], replace(items[2], sketch=None)]
    with pytest.raises(ValueError, match="'item-0-0' and 'item-0-2' must both have a sketch or"):
        write_shard(tmp_path, 0, mixed)
    assert list(tmp_path.iterdir()) == []
    folder = nine_items(tmp_path / "corpus", sketches=True)
    edit(folder / "corpus.json", sketch_codebook_size=None)
    with pytest.raises(UserError, match=r"shard-000000\.json has sketches, and corpus\.json says"):
        Corpus(folder)
    without = nine_items(tmp_path / "without")
    edit(without / "corpus.json", sketch_codebook_size=8)
    with pytest.raises(UserError, match=r"member 000000\.sketch\.npy is wrong or missing"):
        Corpus(without)


@pytest.mark.parametrize("field", ["visual", "text", "captions", "sketch"])
def test_wrong_arrays_are_refused_by_name(tmp_path: Path, field: str) -> None:
    good = random_items(0, 2, Grid(2, 2, 1), sketches=True)
    wrong: dict[str, Any] = {
        "visual": np.zeros(5, np.uint16),
        "text": np.zeros((1, 76), np.uint16),
        "captions": (),
        "sketch": np.zeros((2, 2), np.uint16),
    }
    bad = ShardItem(**{**good[1].__dict__, field: wrong[field]})
    name = "text" if field == "captions" else field
    with pytest.raises(ValueError, match=f"{name} of item 'item-0-1' must be uint16"):
        write_shard(tmp_path, 0, [good[0], bad])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": (), "text": np.zeros((0, 77), np.uint16)}, "with at least one caption"),
        ({"provenance": ("original",) * 9}, "provenance of item .* must have one entry a caption"),
        ({"visual": np.zeros(4, np.int64)}, r"visual of item .* must be uint16 \(4,\), not int64"),
        ({"text": np.zeros((9, 77), np.int64), "captions": ("a",) * 9}, "text .* not int64"),
    ],
)
def test_an_item_has_captions_their_authors_and_tokens_of_16_bits(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    good = random_items(0, 2, Grid(2, 2, 1))
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, 0, [good[0], replace(good[1], **changes)])
    assert list(tmp_path.iterdir()) == []


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_or_unfinished_corpus_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is missing or unfinished"):
        Corpus(tmp_path / "nowhere")
    (folder / "corpus.json").unlink()
    with pytest.raises(UserError, match=r"it has no corpus\.json"):
        Corpus(folder)


def test_foreign_corpus_is_named(folder: Path) -> None:
    edit(folder / "corpus.json", format_version=9)
    with pytest.raises(UserError, match=r"corpus\.json has format_version 9, and this program"):
        Corpus(folder)
    edit(folder / "corpus.json", format_version=1, gird=[1, 1, 1])
    with pytest.raises(UserError, match=r"unknown key 'gird'; did you mean 'grid'"):
        Corpus(folder)
    for text in ("[" * 100_000, "{"):
        (folder / "corpus.json").write_text(text)
        with pytest.raises(UserError, match=r"corpus\.json is not valid JSON"):
            Corpus(folder)
    (folder / "corpus.json").write_text("[]")
    with pytest.raises(UserError, match=r"corpus\.json must hold a JSON object"):
        Corpus(folder)


def test_damaged_shard_is_named(folder: Path) -> None:
    tar, sidecar = folder / "shard-000001.tar", folder / "shard-000001.json"
    content = tar.read_bytes()
    tar.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"shard-000001\.tar has \d+ bytes, and \d+ were written"):
        Corpus(folder)
    tar.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar is missing"):
        Corpus(folder)
    tar.write_bytes(content)
    edit(sidecar, captions=99)
    with pytest.raises(UserError, match=r"shard-000001\.json does not match the entry"):
        Corpus(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", 1 << 20), ("offset", 129), ("size", 22), ("shape", [1, 12]), ("dtype", ">u2")],
)
def test_members_that_cannot_be_are_refused(folder: Path, field: str, value: object) -> None:
    sidecar = folder / "shard-000000.json"
    tree = json.loads(sidecar.read_text())
    tree["groups"][1]["members"][VISUAL][field] = value
    sidecar.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"shard-000000\.json: member 000001\.visual\.npy is wrong"):
        Corpus(folder)


def test_a_sidecar_of_another_tar_is_named(folder: Path) -> None:
    edit(folder / "shard-000000.json", sha256="0" * 64)
    with pytest.raises(UserError, match=r"shard-000000\.json does not match the entry"):
        Corpus(folder)


def test_wrong_grid_is_refused(folder: Path) -> None:
    edit(folder / "corpus.json", grid=[2, 3, 3])
    with pytest.raises(UserError, match=r"member 000000\.visual\.npy is wrong"):
        Corpus(folder)
    edit(folder / "corpus.json", grid=[0, 3, 3])
    with pytest.raises(UserError, match="grid must have sides of at least 1"):
        Corpus(folder)
