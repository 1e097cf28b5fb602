"""A corpus at an address reads like the same corpus in a folder, and few of its shards at once."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from test_shards import random_items, write_corpus

from megatron_nuwa.data.batches import TaskBatches
from megatron_nuwa.data.cache import ShardCache
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.storage import storage_at
from megatron_nuwa.data.text import TextTokenizer, train_bpe
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid

GRID = Grid(2, 3, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = [random_items(seed, 12, GRID) for seed in range(6)]
    return write_corpus(tmp_path / "corpus", GRID, shards, group_items=5)


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """The same files in fsspec's memory."""
    memory, root = fsspec.filesystem("memory"), f"/corpora/{uuid.uuid4()}"
    for path in folder.iterdir():
        memory.pipe_file(f"{root}/{path.name}", path.read_bytes())
    yield f"memory:/{root}"
    memory.rm(root, recursive=True)


def assert_same(one: Corpus, other: Corpus) -> None:
    assert len(one) == len(other)
    for index in range(len(one)):
        np.testing.assert_array_equal(one.visual(index), other.visual(index))
        np.testing.assert_array_equal(one.texts(index), other.texts(index))
        assert one.item(index) == other.item(index)


def test_any_address_reads_like_the_folder(folder: Path, address: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    here = Corpus(folder)
    for place in (address, f"file://{folder}", Path(address)):
        there = Corpus(place, cache)
        assert there.is_remote
        assert_same(there, here)
        assert_same(pickle.loads(pickle.dumps(there)), here)
    tars = {entry.sha256 for entry in here.manifest.shards}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == tars | {"locks"}


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("s3://bucket/corpus/", "s3://bucket/corpus"),
        # Without a host in front.
        ("hdfs:///folder/corpus", "hdfs:///folder/corpus"),
        ("file:///folder/corpus", "file:///folder/corpus"),
        # A path object has one slash left.
        (Path("s3://bucket/corpus"), "s3://bucket/corpus"),
        (Path("file:///folder/corpus"), "file:///folder/corpus"),
    ],
)
def test_an_address_stays_as_it_is_written(given: str | Path, address: str, tmp_path: Path) -> None:
    assert storage_at(given, ShardCache(tmp_path, 1)).address == address


def test_cache_smaller_than_the_corpus_is_enough(
    folder: Path, address: str, tmp_path: Path
) -> None:
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    assert_same(Corpus(address, ShardCache(tmp_path / "cache", largest)), Corpus(folder))


def test_damage_on_the_way_is_named(address: str, tmp_path: Path) -> None:
    path = address.removeprefix("memory:/") + "/shard-000003.tar"
    memory = fsspec.filesystem("memory")
    content = bytearray(memory.cat_file(path))
    content[700] ^= 1
    memory.pipe_file(path, bytes(content))
    corpus = Corpus(address, ShardCache(tmp_path / "cache", 1 << 20))
    corpus.visual(0)
    with pytest.raises(UserError, match=r"memory://.*/shard-000003\.tar has other bytes"):
        corpus.visual(40)


def test_absent_and_foreign_addresses_are_user_errors(address: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    with pytest.raises(UserError, match=r"memory://nowhere is missing or unfinished"):
        Corpus("memory://nowhere", cache)
    with pytest.raises(UserError, match="nosuchsystem://x cannot be reached"):
        Corpus("nosuchsystem://x", cache)
    fsspec.filesystem("memory").rm(address.removeprefix("memory:/") + "/shard-000002.json")
    with pytest.raises(UserError, match=r"cannot be read: .*shard-000002\.json"):
        Corpus(address, cache)


@pytest.mark.parametrize("window", [None, 1, 2])
def test_batches_are_those_of_the_folder_and_a_window_bounds_the_shards(
    folder: Path, address: str, tmp_path: Path, window: int | None
) -> None:
    bpe: TextTokenizer = train_bpe(["a cat", "a dog"], 520)
    cache = ShardCache(tmp_path / "cache", 1 << 20)

    def batches(corpus: Corpus) -> TaskBatches:
        return TaskBatches("t2v", [corpus], bpe, seed=1, batch_size=6, shuffle_window=window)

    here, there = batches(Corpus(folder)), batches(Corpus(address, cache))
    for step in range(24):
        [one], [other] = here.micro_batches(step, 0, 1), there.micro_batches(step, 0, 1)
        assert one.target.equal(other.target)
        assert one.context.tokens.equal(other.context.tokens)
        shards = {pick.item // 12 for pick in here.order.batch(step)}
        if window is not None:
            # 12 and 24 items a window divide by the batch of 6.
            assert len(shards) <= window


def test_expected_shards_arrive_before_they_are_read(address: str, tmp_path: Path) -> None:
    corpus = Corpus(address, ShardCache(tmp_path / "cache", 1 << 20))
    corpus.expect(np.array([0, 13, 30]))
    assert corpus._arriving is not None
    corpus._arriving.shutdown()
    arrived = {path.name for path in (tmp_path / "cache").iterdir()} - {"locks"}
    assert arrived == {corpus.manifest.shards[number].sha256 for number in (0, 1, 2)}


def test_a_step_brings_the_shards_of_a_later_one(address: str, tmp_path: Path) -> None:
    corpus = Corpus(address, ShardCache(tmp_path / "cache", 1 << 20))
    bpe = train_bpe(["a cat", "a dog"], 520)
    batches = TaskBatches(
        "t2v", [corpus], bpe, seed=1, batch_size=6, shuffle_window=1, read_ahead=4
    )
    batches.micro_batches(0, 0, 1)
    assert corpus._arriving is not None
    corpus._arriving.shutdown()
    arrived = {path.name for path in (tmp_path / "cache").iterdir()} - {"locks"}
    # Twelve items a shard are those of two steps.
    shards = {pick.item // 12 for step in (0, 4) for pick in batches.order.batch(step)}
    assert len(shards) == 2
    assert arrived == {corpus.manifest.shards[number].sha256 for number in shards}
