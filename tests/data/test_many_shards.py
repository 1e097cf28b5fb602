"""Corpora of very many shards: what is held for each, what is read when, and what is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_nuwa.data import group_index, shards
from megatron_nuwa.data.caption_bounds import CaptionBounds
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.group_index import Column, GroupIndex
from megatron_nuwa.data.sampling import SamplingOrder
from megatron_nuwa.data.shard_list import ShardEntry, ShardList
from megatron_nuwa.data.shard_tar import Group, Member
from megatron_nuwa.data.shards import (
    CorpusManifest,
    Counts,
    Fingerprints,
    ShardItem,
    Sidecar,
    is_intact,
    parse_manifest,
    read_manifest,
    read_sidecar,
    settings_text,
    shard_name,
    write_settings,
    write_shard,
)
from megatron_nuwa.data.storage import LocalFolder
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid

SHARDS, ITEMS = 3000, 3


def manifest_of(entries: list[ShardEntry]) -> CorpusManifest:
    return CorpusManifest(
        format_version=1,
        grid=(2, 2, 1),
        frames_per_second=None,
        codebook_size=8,
        text_vocabulary_size=520,
        fingerprints=Fingerprints(vqgan="é", bpe="b", decode="d"),
        counts=Counts(
            items=sum(entry.items for entry in entries) or 1,
            captions=sum(entry.captions for entry in entries) or 1,
            failed=0,
        ),
        shards=tuple(entries),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three thousand shards of three items; their tars are links to a few."""
    folder = tmp_path_factory.mktemp("corpus")
    sidecars: list[Sidecar] = []
    for number in range(SHARDS):
        if number < 5:
            items = [
                ShardItem(
                    id=f"{number}-{place}",
                    visual=np.array([number, place, 0, 1], np.uint16),
                    text=np.full((1 + place % 2, 77), 10 * number + place, np.uint16),
                    captions=("a caption",) * (1 + place % 2),
                    frames=1,
                    media="x.png",
                )
                for place in range(ITEMS)
            ]
            sidecars.append(write_shard(folder, number, items, group_items=2))
            continue
        name = shard_name(number)
        os.link(folder / f"{shard_name(number % 5)}.tar", folder / f"{name}.tar")
        sidecars.append(sidecars[number % 5].model_copy(update={"shard": name}))
        (folder / f"{name}.json").write_text(settings_text(sidecars[-1]), encoding="utf-8")
    write_settings(folder / "corpus.json", manifest_of([each.entry() for each in sidecars]))
    return folder


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The small files that are read, in order, of which few are read at opening."""
    monkeypatch.setattr(group_index, "CHECKED_AT_OPENING", 16)
    names: list[str] = []
    read = LocalFolder.read

    def noted(self: LocalFolder, asked: list[str]):  # type: ignore[no-untyped-def]
        names.extend(asked)
        return read(self, asked)

    monkeypatch.setattr(LocalFolder, "read", noted)
    return names


def test_opening_holds_little_a_shard_and_reads_few_sidecars(
    folder: Path, read_names: list[str]
) -> None:
    Corpus(folder)
    read_names.clear()
    tracemalloc.start()
    try:
        corpus = Corpus(folder)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read_names[0] == "corpus.json"
    assert read_names[1:3] == ["shard-000000.json", "shard-000199.json"]
    assert read_names[-1] == f"{shard_name(SHARDS - 1)}.json"
    assert len(read_names) == 17
    assert held < 200 * SHARDS
    assert len(pickle.dumps(corpus)) < 150 * SHARDS
    every = np.arange(len(corpus))
    order = SamplingOrder(0, "t2i", [len(corpus)], 8, None, 4, [corpus.shard_sizes])
    assert len(pickle.dumps(order)) < 20 * SHARDS
    np.testing.assert_array_equal(np.sort(order.picks(0, len(corpus)).item), every)


def test_reading_corpus_json_takes_little_more_than_its_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_nuwa.data.shard_list._BLOCK", 1 << 14)
    content = (folder / "corpus.json").read_bytes()
    tracemalloc.start()
    try:
        parse_manifest(content, "corpus.json")
        assert is_intact(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(content) / 2


def test_items_are_right_in_whatever_order_their_shards_are_read(
    folder: Path, read_names: list[str]
) -> None:
    corpus = Corpus(folder)
    items = np.random.default_rng(0).permutation(len(corpus))
    for part in np.array_split(items, 70):
        visual, text = np.zeros((len(part), 4), np.int64), np.zeros((len(part), 77), np.int64)
        rows, numbers, places = np.arange(len(part)), part // ITEMS % 5, part % ITEMS
        corpus.read_visual(part, visual, rows)
        corpus.read_captions(part, np.full(len(part), 0.9), text, rows)
        np.testing.assert_array_equal(visual[:, 0], numbers)
        np.testing.assert_array_equal(visual[:, 1], places)
        np.testing.assert_array_equal(text[:, 76], 10 * numbers + places)
    assert len(read_names) == len(set(read_names)) == SHARDS + 1
    assert [len(visual) for visual, _ in corpus.groups()] == [2, 1] * SHARDS
    assert corpus.item(5000)["id"] == f"{5000 // ITEMS % 5}-{5000 % ITEMS}"
    again = pickle.loads(pickle.dumps(corpus))
    np.testing.assert_array_equal(again.visual(5000), corpus.visual(5000))
    assert len(read_names) == SHARDS + 1


def test_damage_that_opening_did_not_see_is_named_when_its_shard_is_read(
    folder: Path, read_names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(folder)
    sidecar = folder / "shard-000007.json"
    good = sidecar.read_bytes()
    sidecar.write_bytes(good.replace(b'"bytes": ', b'"bytes": 1'))
    try:
        for _ in range(2):
            with pytest.raises(UserError, match=r"shard-000007\.json does not match the entry"):
                corpus.visual(7 * ITEMS)
        monkeypatch.setattr(group_index, "CHECKED_AT_OPENING", SHARDS)
        with pytest.raises(UserError, match=r"shard-000007\.json does not match the entry"):
            Corpus(folder)
    finally:
        sidecar.write_bytes(good)
    assert corpus.visual(7 * ITEMS)[0] == 2
    tar = folder / "shard-000008.tar"
    tar.rename(folder / "away")
    try:
        with pytest.raises(UserError, match=r"shard-000008\.tar is missing"):
            corpus.visual(8 * ITEMS)
    finally:
        (folder / "away").rename(tar)


def test_lines_that_are_not_as_many_as_the_items_are_named(folder: Path, tmp_path: Path) -> None:
    manifest, sidecars = read_manifest(folder), tmp_path / "corpus"
    sidecars.mkdir()
    sidecar = read_sidecar(folder / "shard-000001.json")
    group = sidecar.groups[0]
    lines = group.members["items.jsonl"]
    short = {**group.members, "items.jsonl": lines.model_copy(update={"size": lines.size // 3})}
    groups = (group.model_copy(update={"members": short}), *sidecar.groups[1:])
    sidecar = sidecar.model_copy(update={"groups": groups})
    write_settings(sidecars / "shard-000001.json", sidecar)
    os.link(folder / "shard-000001.tar", sidecars / "shard-000001.tar")
    counts = Counts(items=ITEMS, captions=4, failed=0)
    update = {"shards": (sidecar.entry(),), "counts": counts}
    write_settings(sidecars / "corpus.json", manifest.model_copy(update=update))
    corpus = Corpus(sidecars)
    for read in (lambda: list(corpus.lines()), lambda: corpus.item(1)):
        with pytest.raises(
            UserError, match=r"shard-000001\.tar: its items\.jsonl at byte \d+ does"
        ):
            read()


def entry(number: int, sealed: bool) -> ShardEntry:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return ShardEntry(
        name=shard_name(number * 37 % 1000),
        items=number**5 + 1,
        captions=number**3 + 7,
        bytes=10 ** (number % 19) - 1,
        sha256=digest,
        sidecar_sha256=digest[::-1] if sealed else None,
    )


@pytest.mark.parametrize("count", [0, 1, 2, 700])
def test_corpus_json_is_written_as_ever_and_read_without_its_shards_objects(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [entry(number, number % 3 > 0) for number in range(count)]
    monkeypatch.setattr("megatron_nuwa.data.shard_list._ROWS", 300)
    monkeypatch.setattr("megatron_nuwa.data.shard_list._BLOCK", 5000)
    write_settings(tmp_path / "corpus.json", manifest_of(entries))
    content = (tmp_path / "corpus.json").read_bytes()
    tree = json.loads(content)
    assert content.decode() == json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
    assert tree["shards"] == [each.model_dump(mode="json") for each in entries]
    unsealed = json.dumps({**tree, "sha256": None}, indent=1, ensure_ascii=False) + "\n"
    assert tree["sha256"] == hashlib.sha256(unsealed.encode()).hexdigest()
    assert is_intact(content)
    manifest = parse_manifest(content, "corpus.json")
    assert list(manifest.shards) == entries
    assert isinstance(manifest.shards, ShardList) or not count
    otherwise = parse_manifest(json.dumps(tree).encode(), "corpus.json")
    assert otherwise == manifest
    assert json.loads(manifest.model_dump_json()) == tree
    assert manifest.fingerprint() == hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
    assert [list(manifest.shards[1:5]), manifest.shards[-1:]] == [
        entries[1:5],
        ShardList.of(entries[-1:]),
    ]


def test_quick_and_thorough_reading_of_corpus_json_agree_on_every_changed_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_settings(tmp_path / "corpus.json", manifest_of([entry(n, n > 0) for n in range(3)]))
    content = (tmp_path / "corpus.json").read_bytes()

    def read(damaged: bytes) -> object:
        try:
            return parse_manifest(damaged, "corpus.json"), is_intact(damaged)
        except UserError as error:
            return str(error)

    quick, thorough = [], []
    for results in (quick, thorough):
        for place in range(len(content)):
            for flip in (1, 0x10, 0x20):
                changed = bytearray(content)
                changed[place] ^= flip
                results.append(read(bytes(changed)))
        monkeypatch.setattr(shards, "laid_out", lambda _: None)
    assert quick == thorough
    assert not any(isinstance(each, tuple) and each[1] for each in quick)


def test_a_wrong_field_of_a_shard_is_named(tmp_path: Path) -> None:
    write_settings(tmp_path / "corpus.json", manifest_of([entry(n, True) for n in range(3)]))
    tree = json.loads((tmp_path / "corpus.json").read_text(encoding="utf-8"))
    tree["shards"][1]["sha256"] = tree["shards"][1]["sha256"].upper()
    with pytest.raises(UserError, match=r"corpus\.json: shards\.1\.sha256: String should match"):
        parse_manifest(json.dumps(tree).encode(), "corpus.json")
    tree["shards"][1]["itmes"] = 3
    with pytest.raises(UserError, match=r"sha256|did you mean 'items'"):
        parse_manifest(json.dumps(tree).encode(), "corpus.json")


class Sidecars:
    """A place that holds sidecars only."""

    is_remote, address = False, "far"

    def __init__(self, sidecars: list[Sidecar]) -> None:
        self.sidecars = {f"{each.shard}.json": each for each in sidecars}

    def read(self, names: list[str]) -> list[bytes]:
        return [settings_text(self.sidecars[name]).encode() for name in names]

    def check(self, entry: ShardEntry) -> None:
        pass


@pytest.mark.parametrize(
    "sizes",
    [
        [[3, 1], [2, 5, 1], [1, 1, 4], [6]],
        # Even but for one group.
        [[2, 2, 1], [2, 2, 3], [4, 4], [6]],
        [[2, 1, 2], [2, 2, 1], [4, 4], [5]],
    ],
)
def test_groups_of_uneven_sizes_are_found(
    monkeypatch: pytest.MonkeyPatch, sizes: list[list[int]]
) -> None:
    monkeypatch.setattr(group_index, "CHECKED_AT_OPENING", 1)
    sidecars = []
    for number, own in enumerate(sizes):
        groups, place = [], 0
        for key, items in enumerate(own):
            members = {}
            for name, shape in (("visual.npy", (items, 4)), ("text.npy", (items, 77))):
                size = 2 * shape[0] * shape[1]
                members[name] = Member(offset=place, size=size, dtype="<u2", shape=shape)
                place += size
            members["items.jsonl"] = Member(offset=place, size=2)
            place += 2
            groups.append(Group(key=str(key), items=items, captions=items, members=members))
        total = sum(own)
        sidecars.append(
            Sidecar(
                shard=shard_name(number),
                items=total,
                captions=total,
                bytes=place,
                sha256="0" * 64,
                groups=tuple(groups),
                failures=(),
            )
        )
    manifest = manifest_of([each.entry() for each in sidecars])
    index = GroupIndex(Sidecars(sidecars), manifest, Grid(2, 2, 1))  # type: ignore[arg-type]
    expected = [
        (shard, group.members["visual.npy"].offset, place)
        for shard, each in enumerate(sidecars)
        for group in each.groups
        for place in range(group.items)
    ]
    for items in (np.array([len(index) - 2, 5, 11, 4, 9, 0]), np.arange(len(index))[::-1]):
        groups, inside = index.locate(items)
        columns = index.column(Column.SHARD)[groups], index.column(Column.VISUAL)[groups], inside
        found = list(zip(*(column.tolist() for column in columns), strict=True))
        assert found == [expected[item] for item in items]


def test_places_of_captions_take_no_more_than_they_may() -> None:
    reads: list[int] = []

    def read(group: int) -> np.ndarray:
        reads.append(group)
        return np.arange(1025) * 2 + (np.arange(1025) > group)

    bounds = CaptionBounds(lambda group: (1024, 1024 if group > 99 else 2049), read, lambda: 10_000)
    for group in [*range(20), *range(20), 100, 101]:
        expected = np.arange(1025) if group > 99 else read(group)
        np.testing.assert_array_equal(bounds.of(group), expected)
    assert bounds.of(100) is bounds.of(101)
    assert sum(each.nbytes for group, each in bounds._held.items() if group < 100) < 10_000
    reads.clear()
    bounds.of(19)
    assert reads == []
