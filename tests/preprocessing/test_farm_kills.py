"""Farms that are killed, starved of disk or shut out, and then repeated."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents, kill_farm, run_farm, start_farm, wait_until

from preprocessing.__main__ import main

SHARDS = 8
ITEMS_PER_SHARD = 4


def rows(count: int) -> list[dict[str, object]]:
    """Clips of the `media` fixture over and over, some broken."""
    return [
        {
            "id": f"item{n}",
            "media": "corrupt.mp4" if n % 11 == 5 else f"clip{n % 7}.mp4",
            "captions": CAPTIONS[: n % 3 + 1],
        }
        for n in range(count)
    ]


def arguments(manifest: Path, output: Path, tools: Path, *more: str) -> list[str]:
    clips = ("--frames", "4", "--fps", "5", "--items-per-shard", str(ITEMS_PER_SHARD))
    return tokenize_command(manifest, output, tools, *clips, *more)


@pytest.fixture(scope="module")
def manifest(media: Path) -> Path:
    return write_manifest(media / "kills.jsonl", rows(SHARDS * ITEMS_PER_SHARD))


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, manifest: Path, tools: Path
) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "corpus"
    assert main(arguments(manifest, output, tools)) == 0
    return contents(output)


def kill_once(command: list[str], ranks: int, folder: Path, choose: random.Random) -> bool:
    """Start a farm, and at a random moment kill one of its ranks or all; false where it was done"""
    output = Path(command[command.index("--output") + 1])
    roles = ["--decode-ranks-per-encoder", str(choose.choice((0, 1)))] if ranks > 1 else []
    farm = start_farm(ranks, [*command, *roles], folder / "log")
    # From the moment on at which files appear; before it there is nothing to harm.
    wait_until(lambda: (output / "settings.json").exists(), farm)
    time.sleep(choose.uniform(0, 1.2))
    return kill_farm(farm, everybody=choose.random() < 0.5, choose=choose)


def test_farm_that_is_killed_four_times_is_completed_to_the_same_bytes(
    manifest: Path, tools: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    command = arguments(manifest, tmp_path / "corpus", tools)
    hits = [kill_once(command, ranks, tmp_path, random.Random(ranks)) for ranks in (1, 3, 2, 1)]
    assert any(hits)
    assert main(command) == 0
    assert contents(tmp_path / "corpus") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ten_farms_killed_at_random_moments_end_in_the_same_bytes(
    manifest: Path, tools: Path, tmp_path: Path, undisturbed: dict[str, bytes], ranks: int
) -> None:
    hits = 0
    for run in range(10):
        choose = random.Random(100 * ranks + run)
        output = tmp_path / f"corpus{run}"
        command = arguments(manifest, output, tools)
        for _ in range(choose.choice((1, 2))):
            hits += kill_once(command, ranks, tmp_path, choose)
        done = run_farm(ranks, command)
        assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log").read_text()
        assert contents(output) == undisturbed, (ranks, run)
    assert hits >= 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, less than the corpus needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_ends_in_one_sentence_and_a_larger_one_completes(
    manifest: Path,
    tools: Path,
    undisturbed: dict[str, bytes],
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(manifest, small_disk / "corpus", tools)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "cannot be written: No space left on device" in told
    assert not (small_disk / "corpus" / "corpus.json").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert main(command) == 0
    assert contents(small_disk / "corpus") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_full_disk_ends_all_ranks(
    manifest: Path, tools: Path, undisturbed: dict[str, bytes], small_disk: Path, ranks: int
) -> None:
    command = arguments(manifest, small_disk / "corpus", tools)
    done = run_farm(ranks, [*command, "--decode-ranks-per-encoder", str(ranks % 2)])
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "cannot be written: No space left on device" in lines[0]
    assert "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert run_farm(ranks, command).returncode == 0
    assert contents(small_disk / "corpus") == undisturbed


def test_output_that_cannot_be_written_is_refused_before_the_work(
    manifest: Path, tools: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(arguments(manifest, small_disk / "corpus", tools)) == 2
    told = capsys.readouterr().err
    assert "cannot be written: Read-only file system" in told
    assert told.count("\n") == 1
    assert list(small_disk.iterdir()) == []
