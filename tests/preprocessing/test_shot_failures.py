"""Films that are broken, hostile or endless: the others get their shots, and each its reason."""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from farm_media import WriteClip, write_manifest
from hostile_clips import NOT_A_VIDEO, clip_bomb, hostile_clips, time_gap
from hostile_media import SIDE, Hostile
from process_memory import MIB, forget_highest_memory, highest_memory
from shot_films import FILM, JUMP, changes, films, find, rows_of, starts_of
from torch import Tensor

from megatron_nuwa.decoders import DecodeError, DecodeLimits, DecodeSettings, decode
from megatron_nuwa.decoders.ffmpeg_process import KilledError
from megatron_nuwa.errors import MachineError
from preprocessing import attempts, shot_manifest, shots
from preprocessing.shot_items import ShotDemands, Window, shots_alone, shots_of_item
from preprocessing.shot_parts import only_command
from preprocessing.sources import SourceItem, read_source

# Of what the farm refuses, these are whole films, only too short for it, or images.
GOOD_HERE = (
    *("one-frame.mp4", "brief.mp4", "whole.mp4", "sound-with-cover.mp4"),
    *("animated.gif", "picture.mp4"),
)
# The farm reads only their beginning.
BAD_HERE = ("cut-late.mp4", "flipped-late.mp4")


@pytest.mark.usefixtures("stand_in")
def test_hostile_films_get_their_reason_or_right_shots(
    tmp_path: Path, write_clip: WriteClip
) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    items = hostile_clips(folder, 9)
    items.append(
        Hostile(time_gap(folder / "gap.mkv", 10**6).name, r"is longer than the 0\.02 hours")
    )
    rows: list[dict[str, object]] = []
    for number, item in enumerate(items):
        good = write_clip(tmp_path / f"good{number}.mp4", FILM, 25) if number % 9 == 0 else None
        if good is not None:
            rows.append({"id": good.stem, "media": good.name, "captions": ["y"]})
        media = str(folder / item.name)
        rows.append({"id": f"bad{number}", "media": media, "captions": ["x"], **item.row})
    source = write_manifest(tmp_path / "films.jsonl", rows)
    limits = ("--film-hours", "0.02", "--attempts", "1")
    assert find(source, tmp_path / "shots.jsonl", *limits) == 0
    found = rows_of(tmp_path / "shots.jsonl")
    assert len(found) == len(rows)
    for name in (row["id"] for row in rows if str(row["id"]).startswith("good")):
        assert starts_of(found[str(name)]) == [None, 1.2]
    complaints = [
        complaint_of(folder, item, found[f"bad{number}"]) for number, item in enumerate(items)
    ]
    assert [complaint for complaint in complaints if complaint] == []


def complaint_of(folder: Path, item: Hostile, rows: list[dict[str, Any]]) -> str | None:
    """What is wrong with the rows of an item; None where nothing is."""
    reasons = [row["not_cut"] for row in rows if "not_cut" in row]
    if reasons:
        if item.name in BAD_HERE:
            item = Hostile(item.name, NOT_A_VIDEO)
        return item.complaint(folder, reasons[0])
    if item.name in BAD_HERE or (item.pixels is None and item.name not in GOOD_HERE):
        return f"{item.name} must have a reason"
    path = folder / item.name
    settings = DecodeSettings(image_size=SIDE, frames=100, frames_per_second=25, short_clips="pad")
    end = item.row.get("end")
    try:
        frames = decode(path, settings, None, end)[0]  # type: ignore[arg-type]
    except DecodeError:
        assert item.name in GOOD_HERE
        frames = np.zeros((1, 1, 1, 3))
    jumps = np.flatnonzero(np.abs(np.diff(frames.mean(axis=(1, 2, 3)))) > JUMP)
    starts = [None, *((jumps + 1) / 25).round(6).tolist()]
    if starts_of(rows) != starts:
        return f"{item.name} has the shots {rows}, and must have them from {starts} on"
    return None


@pytest.mark.usefixtures("stand_in")
def test_a_long_film_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    peaks = []
    # The first run only warms up what a process allocates once.
    for seconds in (10, 10, 3600):
        time_gap(tmp_path / f"gap{seconds}.mkv", seconds)
        source = films(tmp_path, f"gap{seconds}.mkv")
        output = tmp_path / f"{len(peaks)}.jsonl"
        forget_highest_memory()
        assert find(source, output) == 0
        peaks.append(highest_memory())
        rows = rows_of(output)[f"gap{seconds}"]
        assert starts_of(rows) == [None, seconds]
    # An hour of frames takes 334 MiB, and four bytes for each of them 0.3.
    assert peaks[2] - peaks[1] < 16 * MIB


@pytest.mark.usefixtures("stand_in")
def test_frames_without_end_are_a_reason_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_gap(tmp_path / "gap.mkv", 10**6)
    tries = []

    def counted(*all_of_it: Any) -> list[Window]:
        tries.append(all_of_it)
        return shots_of_item(*all_of_it)

    monkeypatch.setattr(shot_manifest, "shots_of_item", counted)
    forget_highest_memory()
    before = highest_memory()
    assert find(films(tmp_path, "gap.mkv"), tmp_path / "shots.jsonl", "--film-hours", "1") == 0
    assert highest_memory() - before < 64 * MIB
    (row,) = rows_of(tmp_path / "shots.jsonl")["gap"]
    assert row["not_cut"] == (
        f"{tmp_path / 'gap.mkv'} is longer than the 1 hours that are allowed, or has a time stamp "
        "that is wrong"
    )
    # No further attempt could mend it.
    assert len(tries) == 1


@pytest.mark.usefixtures("stand_in")
def test_a_film_beyond_the_memory_limit_is_refused(tmp_path: Path) -> None:
    clip_bomb(tmp_path / "bomb.mkv")
    source, output = films(tmp_path, "bomb.mkv"), tmp_path / "shots.jsonl"
    assert find(source, output, "--decode-memory-gib", "0.2") == 0
    (row,) = rows_of(output)["bomb"]
    assert row["not_cut"].endswith("it needs more memory than is allowed")


@pytest.mark.usefixtures("stand_in")
def test_frames_that_come_too_slowly_are_a_reason(tmp_path: Path, write_clip: WriteClip) -> None:
    write_clip(tmp_path / "film.mp4", FILM, 25)
    source, output = films(tmp_path, "film.mp4"), tmp_path / "shots.jsonl"
    assert find(source, output, "--decode-seconds", "0.001") == 0
    (row,) = rows_of(output)["film"]
    assert row["not_cut"].endswith("film.mp4 took longer than 0.001 s to decode a minute of it")
    # What has failed can be given to another run as it is.
    assert find(output, tmp_path / "again.jsonl") == 0
    assert starts_of(rows_of(tmp_path / "again.jsonl")["film"]) == [None, 1.2]


def test_an_interrupt_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(shot_manifest, "load_network", lambda device: interrupted)
    before = {child.pid for child in psutil.Process().children()}
    time_gap(tmp_path / "gap.mkv", 10**5)
    source, output = films(tmp_path, "gap.mkv"), tmp_path / "shots.jsonl"
    assert find(source, output) == 130
    assert {child.pid for child in psutil.Process().children()} <= before
    # It was nobody's fault.
    (folder,) = tmp_path.glob(".*.parts")
    assert attempts.collect(folder / "attempts") == {}


@pytest.mark.parametrize(("kills", "good"), [(2, True), (3, False)])
def test_an_ffmpeg_that_is_killed_costs_no_attempt(
    tmp_path: Path,
    write_clip: WriteClip,
    monkeypatch: pytest.MonkeyPatch,
    kills: int,
    good: bool,
) -> None:
    item = SourceItem(id="film", media=write_clip(tmp_path / "film.mp4", FILM, 25), captions=())
    demands = ShotDemands(threshold=0.5, limits=DecodeLimits())
    read, tries = shots.read_scaled, []

    def struck(*arguments: Any) -> Iterator[np.ndarray]:
        tries.append(arguments)
        pieces = read(*arguments)
        if len(tries) <= kills:
            yield next(pieces)
            pieces.close()
            raise KilledError("film.mp4 cannot be decoded as a video: ffmpeg was killed (SIGKILL)")
        yield from pieces

    monkeypatch.setattr(shots, "read_scaled", struck)
    if good:
        assert len(shots_of_item(item, changes, demands)) == 2
    else:
        with pytest.raises(KilledError):
            shots_of_item(item, changes, demands)
    assert len(tries) == 3


def test_an_endless_film_is_read_once_in_a_process_of_its_own_as_well(tmp_path: Path) -> None:
    item = SourceItem(id="gap", media=time_gap(tmp_path / "gap.mkv", 10**6), captions=())
    demands = ShotDemands(threshold=0.5, limits=DecodeLimits(film_hours=0.02))
    with pytest.raises(DecodeError, match=r"is longer than the 0\.02 hours") as caught:
        shots_alone(item, torch.device("cpu"), demands)
    assert caught.value.permanent


def test_a_lock_that_cannot_be_removed_hides_no_error_behind_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(MachineError, match="told first"), only_command(tmp_path / "shots.jsonl"):  # noqa: PT012
        monkeypatch.setattr(Path, "unlink", refused)
        raise MachineError("told first")
    monkeypatch.undo()
    with only_command(tmp_path / "shots.jsonl"):
        pass


@pytest.mark.parametrize("alone", [False, True])
def test_a_disk_without_room_for_a_copy_is_no_films_fault(tmp_path: Path, alone: bool) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "film.mp4").write_bytes(bytes(100_000))
    with tarfile.open(tmp_path / "films.tar", "w") as archive:
        archive.add(tmp_path / "film.mp4", "film.mp4")
    (item,) = read_source(tmp_path / "films.tar")
    demands = ShotDemands(threshold=0.5, limits=DecodeLimits())
    find_them = partial(shots_of_item, network=changes, demands=demands)
    if alone:
        find_them = partial(shots_alone, device=torch.device("cpu"), demands=demands)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(MachineError, match=r"TMPDIR\) /.* cannot be written: File too large"):
            find_them(item)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("alone", [False, True])
def test_an_ffmpeg_that_cannot_be_started_is_no_films_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_clip: WriteClip, alone: bool
) -> None:
    write_clip(tmp_path / "film.mp4", [0, 60, 120, 180])
    item = SourceItem("film", tmp_path / "film.mp4", ("a film",))
    demands = ShotDemands(threshold=0.5, limits=DecodeLimits())
    find_them = partial(shots_of_item, network=changes, demands=demands)
    if alone:
        find_them = partial(shots_alone, device=torch.device("cpu"), demands=demands)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    with pytest.raises(MachineError, match=r"ffmpeg \(/.*\) cannot be started: No such file"):
        find_them(item)
