"""Repeated ids among more rows than are held in memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from megatron_nuwa.errors import UserError
from preprocessing import repeated_ids
from preprocessing.repeated_ids import Ids, collected_ids


def expected(names: list[str]) -> set[tuple[int, int]]:
    firsts: dict[str, int] = {}
    return {
        (firsts[name], row) for row, name in enumerate(names) if firsts.setdefault(name, row) != row
    }


@pytest.mark.parametrize("at_once", [1 << 22, 100, 7])
@pytest.mark.parametrize("kinds", [3, 300, 100_000])
def test_all_repeats_are_found_with_their_first_row(
    at_once: int, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated_ids, "_ROWS_AT_ONCE", at_once)
    dice = random.Random(kinds)
    names = [f"é{dice.randrange(kinds)}" for _ in range(400)]
    with collected_ids() as ids:
        folder = ids._folder
        for name in names:
            ids.add(name)
        found = list(ids.repeats(names.__getitem__))
        assert len(found) == len(set(found))
        assert set(found) == expected(names)
        first = min(expected(names), key=lambda pair: pair[1], default=None)
        assert ids.first_repeat(names.__getitem__) == first
    assert not folder.exists()


@pytest.mark.parametrize("at_once", [1 << 22, 2])
def test_ids_that_share_a_hash_are_told_apart(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated_ids, "_ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(repeated_ids, "hash_of_id", lambda name: ord(name[0]) << 56)
    names = ["aa", "ab", "b", "ac", "ab", "bb", "aa", "ab"]
    with collected_ids() as ids:
        for name in names:
            ids.add(name)
        assert set(ids.repeats(names.__getitem__)) == {(1, 4), (0, 6), (1, 7)}
        assert ids.first_repeat(names.__getitem__) == (1, 4)


def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated_ids, "_ROWS_AT_ONCE", 5000)
    peaks = []
    for rows in (10_000, 50_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        tracemalloc.start()
        try:
            ids = Ids(folder)
            for row in range(rows):
                ids.add(f"item-{row}")
            assert ids.first_repeat(lambda row: f"item-{row}") is None
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert sum(path.stat().st_size for path in folder.iterdir()) == 16 * rows
    # The ids of 40,000 rows in a set take over 4 MB.
    assert peaks[1] - peaks[0] < 100_000


def test_a_full_temporary_folder_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated_ids, "_ROWS_AT_ONCE", 2)
    ids = Ids(tmp_path / "gone")
    ids.add("a")
    with pytest.raises(UserError, match=r"temporary folder .* cannot be written: .*; let TMPDIR"):
        ids.add("b")
