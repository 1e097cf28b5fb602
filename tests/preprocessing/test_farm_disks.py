"""Farms whose disk becomes full or read-only at any moment, and is then mended."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from disks import PAGE, FailingDisk, MakeDisk
from farm_clips import SHARDS, clip_command
from farm_runs import Moment, contents, end_of, family_of, run_farm, start_farm

from preprocessing import watch
from preprocessing.__main__ import main

# Several farms one after the other, and a machine may be slow.
pytestmark = pytest.mark.timeout(3000)
FULL = "No space left on device"
READ_ONLY = "Read-only file system"
PLENTY = "size=8m"
JOURNAL = "journal"
SCALARS = "events"
TRIES = 4


@pytest.fixture(scope="module")
def written(
    clip_manifest: Path, tools: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, int]]:
    """The files that a lone farm writes, in their order, each with its pages."""
    output = tmp_path_factory.mktemp("written") / "corpus"
    found: list[tuple[str, int]] = []
    replace = os.replace

    def noted(source: Any, target: Any) -> None:
        found.append((Path(target).name, pages(Path(source))))
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", noted)
        assert main(clip_command(clip_manifest, output, tools)) == 0
    names = [name for name, _ in found]
    # These two are no files that appear at once.
    found.insert(names.index("failures.jsonl"), (SCALARS, 1))
    found.insert(names.index("plan.json") + 1, (JOURNAL, 1))
    return found


@pytest.fixture(autouse=True)
def scalars_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine, too: the order of the files is what these disks are made for."""
    monkeypatch.setattr(watch, "SCALARS_EVERY_SECONDS", 1e9)


def pages(path: Path) -> int:
    return -(-path.stat().st_size // PAGE)


def room_before(written: list[tuple[str, int]], name: str, journals: int = 1) -> int:
    """Pages of a disk that is full at the last page of a file."""
    names = [each for each, _ in written]
    place = names.index(name)
    more = journals - 1 if place > names.index(JOURNAL) else 0
    return sum(count for _, count in written[: place + 1]) - 1 + more


def check_remains(output: Path, undisturbed: dict[str, bytes]) -> None:
    """Whatever there is by its name is whole, and nothing says that the corpus is."""
    there = contents(output) if output.exists() else {}
    assert "corpus.json" not in there
    for name, content in there.items():
        assert name.startswith(".") or content == undisturbed[name], name


def check_told(done: subprocess.CompletedProcess[str], reason: str) -> None:
    """One sentence, of the first rank; mpirun may add words of its own."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert f"cannot be written: {reason}" in lines[0]
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    "place",
    [
        "shard-000002.jsonl",
        JOURNAL,
        "shard-000003.tar",
        "shard-000003.json",
        SCALARS,
        "corpus.json",
        *(
            pytest.param(place, marks=pytest.mark.slow)
            for place in ("settings.json", "engines.json", "plan.json", "failures.jsonl")
        ),
    ],
)
def test_full_disk_ends_in_one_sentence_and_a_larger_one_completes(
    clip_manifest: Path,
    tools: Path,
    undisturbed: dict[str, bytes],
    written: list[tuple[str, int]],
    memory_disk: MakeDisk,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    disk = memory_disk(max(1, room_before(written, place)))
    if not room_before(written, place):
        (disk.folder / "something else").write_bytes(bytes(PAGE))
    output = disk.folder / "corpus"
    command = clip_command(clip_manifest, output, tools)
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"cannot be written: {FULL}" in told
    check_remains(output, undisturbed)
    names = [name for name, _ in written]
    # All that came before it is there, and neither it nor half of it.
    assert set(contents(output)) == set(names[: names.index(place)]) & set(undisturbed)
    disk.change(PLENTY)
    assert main(command) == 0
    assert contents(output) == undisturbed


@pytest.mark.slow
def test_disk_that_is_full_at_any_page_ends_in_one_sentence(
    clip_manifest: Path,
    tools: Path,
    undisturbed: dict[str, bytes],
    written: list[tuple[str, int]],
    memory_disk: MakeDisk,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = sum(count for _, count in written)
    disk = memory_disk(1)
    output = disk.folder / "corpus"
    command = clip_command(clip_manifest, output, tools)
    capsys.readouterr()
    # The last page that is short is that of corpus.json.
    for room in range(1, whole):
        disk.change(f"size={room * PAGE}")
        assert main(command) == 2, room
        told = capsys.readouterr().err
        assert told.count("\n") == 1, told
        assert f"cannot be written: {FULL}" in told
        check_remains(output, undisturbed)
        # The same corpus, gone on with on a larger disk.
        moved = tmp_path / f"moved{room}"
        shutil.copytree(disk.folder, moved)
        assert main(clip_command(clip_manifest, moved / "corpus", tools)) == 0
        assert contents(moved / "corpus") == undisturbed
        shutil.rmtree(moved)
        for folder in disk.folder.iterdir():
            shutil.rmtree(folder)
        capsys.readouterr()
    disk.change(f"size={whole * PAGE}")
    assert main(command) == 0
    assert contents(output) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    "place", ["shard-000002.jsonl", JOURNAL, "shard-000003.tar", "shard-000005.json", "corpus.json"]
)
def test_full_disk_ends_all_ranks(
    clip_manifest: Path,
    tools: Path,
    undisturbed: dict[str, bytes],
    written: list[tuple[str, int]],
    memory_disk: MakeDisk,
    ranks: int,
    place: str,
) -> None:
    decode_ranks = ranks % 2
    encoders = -(-ranks // (decode_ranks + 1))
    # One for each rank that decodes, which an encoder does that has no decode rank.
    journals = ranks - min(encoders, ranks - encoders)
    disk = memory_disk(room_before(written, place, journals))
    output = disk.folder / "corpus"
    command = clip_command(clip_manifest, output, tools)
    done = run_farm(ranks, [*command, "--decode-ranks-per-encoder", str(decode_ranks)])
    check_told(done, FULL)
    check_remains(output, undisturbed)
    disk.change(PLENTY)
    done = run_farm(ranks, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(output) == undisturbed


def test_output_that_cannot_be_written_is_refused_before_the_work(
    clip_manifest: Path,
    tools: Path,
    undisturbed: dict[str, bytes],
    memory_disk: MakeDisk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = memory_disk(2048)
    disk.change("ro")
    output = disk.folder / "corpus"
    command = clip_command(clip_manifest, output, tools)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"cannot be written: {READ_ONLY}" in told
    assert told.count("\n") == 1
    assert list(disk.folder.iterdir()) == []
    disk.change("rw")
    assert main(command) == 0
    assert contents(output) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("done_before", [False, True])
def test_disk_that_is_read_only_at_the_start_ends_all_ranks(
    clip_manifest: Path,
    tools: Path,
    undisturbed: dict[str, bytes],
    memory_disk: MakeDisk,
    ranks: int,
    done_before: bool,
) -> None:
    """Before there is anything, and before a corpus is gone on with."""
    disk = memory_disk(2048)
    output = disk.folder / "corpus"
    command = clip_command(clip_manifest, output, tools)
    if done_before:
        assert main(command) == 0
        for name in ("corpus.json", "shard-000004.json"):
            (output / name).unlink()
    before = contents(output) if done_before else {}
    disk.change("ro")
    check_told(run_farm(ranks, command), READ_ONLY)
    assert (contents(output) if output.exists() else {}) == before
    disk.change("rw")
    done = run_farm(ranks, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(output) == undisturbed


@pytest.mark.parametrize(
    ("ranks", "seed"),
    [
        (1, 0),
        *(
            pytest.param(ranks, seed, marks=pytest.mark.slow)
            for ranks in (1, 2, 3, 4)
            for seed in (1, 2, 3)
        ),
    ],
)
def test_disk_that_becomes_read_only_amid_the_work_ends_in_one_sentence(
    clip_manifest: Path,
    tools: Path,
    undisturbed: dict[str, bytes],
    failing_disk: FailingDisk,
    tmp_path: Path,
    ranks: int,
    seed: int,
) -> None:
    choose = random.Random(10 * ranks + seed)
    output = failing_disk.folder / "corpus"
    command = clip_command(clip_manifest, output, tools)
    roles = ["--decode-ranks-per-encoder", str(choose.choice((0, 1)))] if ranks > 1 else []
    for number in range(TRIES):
        log = tmp_path / f"log{number}"
        moment = Moment.chosen(output, SHARDS, choose)
        farm = start_farm(ranks, [*command, *roles], log)
        moment.await_in(farm, output)
        family = family_of(farm)
        failing_disk.fail()
        code = end_of(farm, family)
        failing_disk.mend()
        if not (output / "corpus.json").exists():
            break
        # It was done: another one is disturbed at another moment.
        for folder in failing_disk.folder.iterdir():
            shutil.rmtree(folder)
    told = log.read_text()
    check_told(subprocess.CompletedProcess(command, code, "", told), READ_ONLY)
    check_remains(output, undisturbed)
    done = run_farm(ranks, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(output) == undisturbed
