"""Storage that stumbles is read again; what stays unreadable is named, and told from a mistake."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from test_shards import random_items, write_corpus

from megatron_nuwa.data import retry
from megatron_nuwa.data.cache import ShardCache
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.errors import UnreadableError, UserError
from megatron_nuwa.grid import Grid

GRID = Grid(2, 3, 2)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; nobody really waits."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = [random_items(seed, 12, GRID) for seed in range(2)]
    return write_corpus(tmp_path / "corpus", GRID, shards, group_items=5)


def stumbling(times: int, act: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, which fails so many times for files of that name."""
    left = [times]

    def stumble(where: Any, *arguments: Any, **more: Any) -> Any:
        paths = [str(part) for part in (where, *arguments)]
        if left[0] and any(path.endswith(name) for path in paths):
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        return act(where, *arguments, **more)

    return stumble


@pytest.mark.parametrize("method", ["open", "read_bytes", "stat", "is_file"])
def test_a_folder_that_stumbles_twice_is_read_all_the_same(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pauses: list[float],
    method: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "corpus.json" if method == "is_file" else "0001.tar"
    name = "0001.json" if method == "read_bytes" else name
    monkeypatch.setattr(Path, method, stumbling(2, getattr(Path, method), name))
    corpus = Corpus(folder)
    assert [len(corpus.visual(item)) for item in (0, 23)] == [12, 12]
    assert corpus.item(23)["id"]
    assert pauses == list(retry.PAUSES[:2])
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: ")
    assert first.endswith(f"{name} cannot be read: Input/output error; trying again in 0.2 s")
    assert second.endswith("trying again in 1 s")


def test_reading_an_open_shard_is_tried_again_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    corpus, pread, left = Corpus(folder), os.pread, [1]

    def fails_once(*arguments: int) -> bytes:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", fails_once)
    assert corpus.item(0)["id"]
    assert len(pauses) == 1


def test_an_address_that_stumbles_is_read_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    memory, root = fsspec.filesystem("memory"), f"/corpora/{uuid.uuid4()}"
    for path in folder.iterdir():
        memory.pipe_file(f"{root}/{path.name}", path.read_bytes())
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", stumbling(2, type(memory).cat_file, "corpus.json"))
        patch.setattr(type(memory), "open", stumbling(1, type(memory).open, "0001.tar"))
        there = Corpus(f"memory:/{root}", cache)
        assert (there.visual(23) == Corpus(folder).visual(23)).all()
    assert len(pauses) == 3
    pauses.clear()
    memory.rm(root, recursive=True)
    with pytest.raises(UnreadableError, match=r"memory://.*/shard-000000\.tar cannot be read"):
        there.visual(0)
    assert pauses == list(retry.PAUSES)


def test_what_vanishes_after_the_opening_is_a_fault_and_what_was_never_there_a_mistake(
    folder: Path, pauses: list[float]
) -> None:
    corpus = Corpus(folder)
    shutil.move(folder / "shard-000001.tar", folder / "moved")
    sentence = r"^.*shard-000001\.tar cannot be read: No such file or directory$"
    with pytest.raises(UnreadableError, match=sentence):
        corpus.visual(23)
    assert pauses == list(retry.PAUSES)
    pauses.clear()
    for missing in ("shard-000001.tar", "shard-000001.json", "corpus.json"):
        (folder / missing).unlink(missing_ok=True)
        with pytest.raises(UserError, match=missing) as caught:
            Corpus(folder)
        assert not isinstance(caught.value, UnreadableError)
    assert pauses == []
