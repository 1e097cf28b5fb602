"""Attempts that are counted on disk, items that kill their rank, failed items that come back."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from farm_clips import clip_command
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents, run_farm
from power import Disk

from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import UserError
from preprocessing import assembly
from preprocessing.__main__ import main
from preprocessing.attempts import (
    Attempts,
    Journal,
    Journals,
    Trial,
    collect,
    forget,
    try_item,
)
from preprocessing.filters import FilteredError
from preprocessing.state import FarmFolder

# In every Python process: an image of this name ends whoever opens it, as a broken library would.
# Kills the rank itself, and not the process to which it hands what it decodes.
POISON = """
import json, os, signal
dumps = json.dumps
def dump(value, *more, **options):
    text = dumps(value, *more, **options)
    if "poison" in text and '"task"' in text:
        os.kill(os.getpid(), signal.SIGKILL)
    return text
json.dumps = dump
"""


def arguments(manifest: Path, output: Path, tools: Path, *more: str) -> list[str]:
    return tokenize_command(manifest, output, tools, "--items-per-shard", "2", *more)


def image_rows(count: int) -> list[dict[str, object]]:
    return [
        {"id": f"i{n}", "media": f"image{n}.png", "captions": CAPTIONS[:1]} for n in range(count)
    ]


def test_journals_tell_failures_and_deaths(tmp_path: Path) -> None:
    with Journal(tmp_path) as ended_well:
        ended_well.begin(3)
        ended_well.fail(3)
        ended_well.begin(3)
        ended_well.fail(3)
        ended_well.begin(4)
        ended_well.succeed()
        ended_well.begin(5)
    killed = Journal(tmp_path)
    killed.begin(123456)
    killed.begin(7)
    expected = {3: Attempts(failed=2), 7: Attempts(deaths=1)}
    assert collect(tmp_path) == expected
    assert collect(tmp_path) == expected
    again = Journal(tmp_path)
    again.begin(7)
    assert collect(tmp_path)[7] == Attempts(deaths=2)
    forget(tmp_path)
    assert collect(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("end", "deaths"), [(MemoryError, 1), (SystemError, 1), (KeyboardInterrupt, 0), (UserError, 0)]
)
def test_an_end_that_nobody_foresaw_is_held_against_the_row_under_work(
    tmp_path: Path, end: type[BaseException], deaths: int
) -> None:
    def work() -> None:
        with Journal(tmp_path) as journal:
            journal.begin(7)
            raise end

    with pytest.raises(end):
        work()
    assert collect(tmp_path).get(7, Attempts()) == Attempts(deaths=deaths)


@pytest.mark.parametrize("error", [FilteredError("duration", "too short"), UserError("no sketch")])
def test_an_item_that_is_left_out_is_under_work_no_more(tmp_path: Path, error: UserError) -> None:
    def decide() -> None:
        raise error

    idle = Journal(tmp_path)
    with pytest.raises(type(error)):
        try_item(Trial(7, "a.png", Attempts(), 3), idle, decide, decide)
    # As it is when its rank is killed before there is another item.
    assert collect(tmp_path) == {}


def test_journal_that_was_counted_but_not_removed_is_not_counted_again(tmp_path: Path) -> None:
    killed = Journal(tmp_path)
    killed.begin(7)
    journal = next(tmp_path.glob("journal-*"))
    kept = journal.read_bytes()
    collect(tmp_path)
    journal.write_bytes(kept)
    assert collect(tmp_path) == {7: Attempts(deaths=1)}


def test_counts_are_on_the_disk_before_the_journals_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path) as journal:
        journal.fail(7)
    disk, unlink = Disk(monkeypatch), Path.unlink
    known: list[bool] = []

    def noted(path: Path, missing_ok: bool = False) -> None:
        known.append("attempts.json" in disk.names(tmp_path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    collect(tmp_path)
    assert known == [True]


def test_notes_reach_the_disk_soon_and_not_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []

    def noted(handle: int) -> None:
        synced.append(os.pread(handle, 20, 0).strip())

    monkeypatch.setattr(os, "fdatasync", noted)
    journals = Journals(tmp_path, seconds=0.1)
    start = time.monotonic()
    with journals.open() as journal:
        rows = 0
        while time.monotonic() - start < 0.5:
            rows += 1
            journal.begin(rows)
        within = len(synced)
        assert rows > 100
        assert 1 <= within <= (time.monotonic() - start) / 0.1 + 1
        # The last note too, after which nothing is written any more; and then there is rest,
        # but for a note that was being written when the disk was asked.
        deadline = time.monotonic() + 30
        while synced[-1] != str(rows).encode() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert synced[-1] == str(rows).encode()
        count = len(synced)
        time.sleep(0.5)
        assert len(synced) <= count + 1
    journals.close()


def test_a_disk_that_refuses_is_told_at_the_next_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuses)
    journal = Journal(tmp_path)
    journal.begin(1)
    journal.sync()
    with pytest.raises(UserError, match="cannot be written: Input/output error"):
        journal.begin(2)


def test_item_that_kills_its_rank_is_found_and_the_others_go_on(
    media: Path, tools: Path, tmp_path: Path
) -> None:
    shutil.copy(media / "image0.png", media / "poison.png")
    rows = image_rows(4)
    rows.insert(1, {"id": "poison", "media": "poison.png", "captions": CAPTIONS[:1]})
    manifest = write_manifest(media / "poison.jsonl", rows)
    (tmp_path / "sitecustomize.py").write_text(POISON)
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    command = arguments(manifest, tmp_path / "corpus", tools, "--attempts", "2")
    assert run_farm(1, command, PYTHONPATH=path).returncode == -9
    done = run_farm(1, command, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "4 items, 4 captions, 1 failed" in done.stdout
    failure = json.loads((tmp_path / "corpus" / "failures.jsonl").read_text())
    assert failure["id"] == "poison"
    assert "poison.png ends the process that decodes it (SIGKILL)" in failure["reason"]
    # Another chance for it ends in the same way.
    retry, before = [*command, "--retry-failed"], contents(tmp_path / "corpus")
    assert run_farm(1, retry, PYTHONPATH=path).returncode == -9
    done = run_farm(1, retry, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "corpus") == before
    # Without the poison it is a good image.
    assert main(retry) == 0
    assert main(arguments(manifest, tmp_path / "plain", tools)) == 0
    assert contents(tmp_path / "corpus") == contents(tmp_path / "plain")


def test_failed_items_are_left_alone_until_they_are_asked_for(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for n in (0, 1, 3, 4, 5):
        shutil.copy(media / f"image{n}.png", folder)
    manifest = write_manifest(folder / "images.jsonl", image_rows(6))
    output = tmp_path / "corpus"
    command = arguments(manifest, output, tools)
    assert main(command) == 0
    kept = (output / "shard-000000.tar").stat().st_mtime_ns
    before = contents(output)
    shutil.copy(media / "image2.png", folder)
    assert main(command) == 0
    assert "is finished already" in capsys.readouterr().out
    assert contents(output) == before
    assert main([*command, "--retry-failed"]) == 0
    assert "6 items, 6 captions, 0 failed; 1 shards" in capsys.readouterr().out
    assert (output / "shard-000000.tar").stat().st_mtime_ns == kept
    assert main(arguments(manifest, tmp_path / "undisturbed", tools)) == 0
    assert contents(output) == contents(tmp_path / "undisturbed")
    assert main([*command, "--retry-failed"]) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_retry_that_is_interrupted_goes_on_unless_it_has_other_limits(
    media: Path, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = image_rows(6)
    for row in rows[::2]:
        row["media"] = "gone.png"
    output = tmp_path / "corpus"
    command = arguments(write_manifest(media / "gone.jsonl", rows), output, tools)
    assert main(command) == 0
    before = contents(output)
    real, made, limit = assembly.write_shard, list[int](), 0

    def written(folder: Path, shard: int, *more: Any) -> Any:
        if len(made) == limit:
            raise KeyboardInterrupt
        made.append(shard)
        return real(folder, shard, *more)

    def retry(most: int, *more: str) -> list[int]:
        """The shards that are made until, after so many, it is interrupted."""
        nonlocal limit
        made.clear()
        limit = most
        assert (main([*command, "--retry-failed", *more]) == 0) == (most > 3)
        return list(made)

    monkeypatch.setattr(assembly, "write_shard", written)
    assert retry(2) == [0, 1]
    assert retry(0) == []
    assert retry(9) == [2]
    assert contents(output) == before
    # The next one is another one.
    assert retry(1) == [0]
    assert retry(9, "--attempts", "4") == [0, 1, 2]
    assert retry(1) == [0]
    shutil.rmtree(output)
    # Of a new corpus it is none.
    assert retry(2) == [0, 1]
    assert retry(9) == [2]
    assert contents(output) == before


def test_a_note_of_a_retry_that_its_end_could_not_remove_is_no_other_ones(
    media: Path, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*image_rows(1), {"id": "gone", "media": "gone.png", "captions": CAPTIONS[:1]}]
    output = tmp_path / "corpus"
    command = arguments(write_manifest(media / "gone.jsonl", rows), output, tools)
    assert main(command) == 0
    before = (output / "shard-000000.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(FarmFolder, "forget_retry", lambda _: None)
        assert main([*command, "--retry-failed"]) == 0
    middle = (output / "shard-000000.json").stat().st_mtime_ns
    assert main([*command, "--retry-failed"]) == 0
    assert before < middle < (output / "shard-000000.json").stat().st_mtime_ns


def test_a_retry_makes_damaged_shards_anew_too(media: Path, tools: Path, tmp_path: Path) -> None:
    rows = [*image_rows(3), {"id": "gone", "media": "gone.png", "captions": CAPTIONS[:1]}]
    output = tmp_path / "corpus"
    command = arguments(write_manifest(media / "damaged.jsonl", rows), output, tools)
    assert main(command) == 0
    before = contents(output)
    for content in (bytes(100), b"{}"):
        (output / "shard-000000.json").write_bytes(content)
        assert main([*command, "--retry-failed"]) == 0
        assert contents(output) == before


@pytest.mark.parametrize(("attempts", "good"), [(2, 0), (3, 1)])
def test_item_is_tried_as_often_as_is_asked_for(
    media: Path,
    tools: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempts: int,
    good: int,
) -> None:
    from megatron_nuwa.decoders import DecodeError
    from preprocessing import decode_worker

    real, tries = decode_worker.decode_item, []

    def unsteady(item, settings):  # type: ignore[no-untyped-def]
        if item.id == "i1":
            tries.append(item.id)
            if len(tries) < 3:
                raise DecodeError(f"{item.media} is on a server that is being restarted")
        return real(item, settings)

    monkeypatch.setattr(decode_worker, "decode_item", unsteady)
    manifest = write_manifest(media / "unsteady.jsonl", image_rows(2))
    output = tmp_path / "corpus"
    command = arguments(manifest, output, tools, "--attempts", str(attempts))
    assert main(command) == 0
    assert len(tries) == attempts
    failures = (output / "failures.jsonl").read_text().splitlines()
    assert len(failures) == 1 - good


# Instead of ffmpeg: whatever it is asked to do, it is killed the first time.
KILLED_AT_FIRST = """#!/bin/sh
if mkdir "{folder}/$(echo "$@" | cksum | tr ' ' -)" 2>/dev/null; then kill -KILL $$; fi
exec "{ffmpeg}" "$@"
"""


def test_decoders_that_are_killed_cost_no_attempt_and_change_no_reason(
    clip_manifest: Path,
    tools: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "ffmpeg"
    ffmpeg = ffmpeg_program()
    program.write_text(KILLED_AT_FIRST.format(folder=tmp_path, ffmpeg=ffmpeg))
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    output = tmp_path / "corpus"
    assert main(clip_command(clip_manifest, output, tools, "--attempts", "1")) == 0
    assert contents(output) == undisturbed


def test_two_farms_never_work_at_one_corpus(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(media / "lock.jsonl", image_rows(2))
    output = tmp_path / "corpus"
    with FarmFolder(output).locked():
        assert main(arguments(manifest, output, tools)) == 2
    assert "another farm is at work on this corpus" in capsys.readouterr().err
    assert not output.exists()
    assert main(arguments(manifest, output, tools)) == 0


def test_unwritable_output_leaves_nothing_beside_it(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    manifest = write_manifest(media / "way.jsonl", image_rows(2))
    assert main(arguments(manifest, tmp_path / "file" / "corpus", tools)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
