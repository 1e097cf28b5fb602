"""Broken and hostile media get a reason or right frames, and harm nothing else."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from farm_media import CAPTIONS, WriteClip, tokenize_command, write_manifest
from farm_runs import run_farm
from hostile_clips import LEVELS, clip_bomb, hostile_clips
from hostile_images import hostile_images, scan_bomb
from hostile_media import FRAMES, RATE, SIDE, Hostile
from PIL import Image

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.decoders import DecodeError, DecodeLimits, DecodeSettings, decode
from preprocessing.__main__ import main
from preprocessing.verify import find_damage

IMAGES = DecodeSettings(image_size=SIDE)
CLIPS = DecodeSettings(image_size=SIDE, frames=FRAMES, frames_per_second=RATE)


@pytest.fixture(scope="module")
def visits() -> Iterator[list[object]]:
    """Connections to a local server, whose port is the first entry."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen: list[object] = [server.getsockname()[1]]

        def listen() -> None:
            while True:
                try:
                    connection, caller = server.accept()
                except OSError:
                    return
                seen.append(caller)
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        yield seen


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Hostile]]:
    folder = tmp_path_factory.mktemp("hostile-images")
    return folder, hostile_images(folder)


@pytest.fixture(scope="module")
def clips(
    tmp_path_factory: pytest.TempPathFactory, visits: list[int]
) -> tuple[Path, list[Hostile]]:
    folder = tmp_path_factory.mktemp("hostile-clips")
    return folder, hostile_clips(folder, visits[0])


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_bomb(tmp_path_factory.mktemp("bomb") / "bomb.mkv")


def outcome(folder: Path, item: Hostile, settings: DecodeSettings) -> np.ndarray | str:
    start, end = (item.row.get(name) for name in ("start", "end"))
    try:
        return decode(folder / item.name, settings, start, end)[0]  # type: ignore[arg-type]
    except DecodeError as error:
        return str(error)


def complaints(folder: Path, items: list[Hostile], settings: DecodeSettings) -> list[str]:
    found = [item.complaint(folder, outcome(folder, item, settings)) for item in items]
    return [complaint for complaint in found if complaint]


def test_there_are_enough_of_them(
    images: tuple[Path, list[Hostile]], clips: tuple[Path, list[Hostile]]
) -> None:
    assert len(images[1]) >= 40
    assert len(clips[1]) >= 40


def test_images_get_their_reason_or_right_pixels(images: tuple[Path, list[Hostile]]) -> None:
    assert complaints(*images, IMAGES) == []


@pytest.mark.parametrize("backend", ["ffmpeg", "pyav"])
def test_clips_get_their_reason_or_right_frames(
    clips: tuple[Path, list[Hostile]], visits: list[object], backend: str
) -> None:
    if backend == "pyav":
        pytest.importorskip("av")
    assert complaints(*clips, CLIPS.model_copy(update={"backend": backend})) == []
    assert len(visits) == 1, "a playlist has opened an address"


@pytest.mark.parametrize(
    ("kind", "decoder", "ranks"),
    [
        ("images", "ffmpeg", 1),
        ("clips", "ffmpeg", 1),
        ("clips", "pyav", 1),
        pytest.param("images", "ffmpeg", 2, marks=pytest.mark.slow),
        pytest.param("clips", "ffmpeg", 2, marks=pytest.mark.slow),
        pytest.param("clips", "pyav", 2, marks=pytest.mark.slow),
    ],
)
def test_farm_records_them_and_shifts_no_other_item(
    kind: str,
    decoder: str,
    ranks: int,
    request: pytest.FixtureRequest,
    visits: list[object],
    tools: Path,
    tmp_path: Path,
    write_clip: WriteClip,
) -> None:
    if decoder == "pyav":
        pytest.importorskip("av")
    folder, items = request.getfixturevalue(kind)
    good = good_rows(kind, tmp_path, write_clip)
    bad: list[dict[str, object]] = [
        {"id": f"bad{n}", "media": str(folder / item.name), "captions": ["x"], **item.row}
        for n, item in enumerate(items)
    ]
    mixed = sorted(good + bad, key=lambda row: hash_of(str(row["id"])))
    alone = [row for row in mixed if row in good]
    frames = ["1"] if kind == "images" else [str(FRAMES), "--fps", str(RATE)]
    more = ("--frames", *frames, "--items-per-shard", "16", "--decoder", decoder)
    for name, rows in (("mixed", mixed), ("alone", alone)):
        manifest = write_manifest(tmp_path / f"{name}.jsonl", rows)
        command = tokenize_command(manifest, tmp_path / name, tools, *more)
        # A lone process needs no launcher, and so no second start of Python.
        if ranks == 1:
            assert main(command) == 0
        else:
            done = run_farm(ranks, command)
            assert done.returncode == 0, done.stderr
    assert_same_items(Corpus(tmp_path / "mixed"), Corpus(tmp_path / "alone"))
    reasons = read_failures(tmp_path / "mixed")
    for number, item in enumerate(items):
        if item.pixels is None:
            assert item.complaint(folder, reasons[f"bad{number}"]) is None
        if item.reason is None:
            assert f"bad{number}" not in reasons
    assert len(visits) == 1, "a playlist has opened an address"
    assert find_damage(tmp_path / "mixed", full=True) == []


@pytest.mark.parametrize(
    ("decoder", "gib", "reason"),
    [("ffmpeg", "4", "has 1 frames"), ("pyav", "0.2", "more memory than is allowed")],
)
def test_farm_records_a_clip_bomb_and_goes_on(
    decoder: str,
    gib: str,
    reason: str,
    bomb: Path,
    tools: Path,
    tmp_path: Path,
    write_clip: WriteClip,
) -> None:
    if decoder == "pyav":
        pytest.importorskip("av")
    rows = good_rows("clips", tmp_path, write_clip)
    rows.insert(5, {"id": "bomb", "media": str(bomb), "captions": ["x"]})
    manifest = write_manifest(tmp_path / "bombed.jsonl", rows)
    frames = ("--frames", str(FRAMES), "--fps", str(RATE), "--decoder", decoder)
    limits = ("--decode-memory-gib", gib, "--attempts", "1")
    assert main(tokenize_command(manifest, tmp_path / "corpus", tools, *frames, *limits)) == 0
    assert len(Corpus(tmp_path / "corpus")) == 12
    reasons = read_failures(tmp_path / "corpus")
    assert reasons.keys() == {"bomb"}
    assert reasons["bomb"].startswith(str(bomb))
    assert reason in reasons["bomb"]


def good_rows(kind: str, folder: Path, write_clip: WriteClip) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number in range(12):
        path = folder / (f"good{number}.png" if kind == "images" else f"good{number}.mp4")
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        if kind == "images":
            Image.fromarray(noise).save(path)
        else:
            write_clip(path, [level + 5 * number for level in LEVELS])
        rows.append({"id": path.stem, "media": path.name, "captions": [CAPTIONS[number % 3]]})
    return rows


def hash_of(name: str) -> int:
    """Mixes good items among bad ones, the same way in every run."""
    return int.from_bytes(name.encode(), "little") * 2654435761 % 2**32


def assert_same_items(mixed: Corpus, alone: Corpus) -> None:
    places = {mixed.item(n)["id"]: n for n in range(len(mixed))}
    assert len(alone) == 12
    for number in range(len(alone)):
        place = places[alone.item(number)["id"]]
        # Where an item's captions lie in its shard depends on what lies before them.
        for name in ("id", "media", "captions", "frames"):
            assert mixed.item(place)[name] == alone.item(number)[name]
        np.testing.assert_array_equal(mixed.visual(place), alone.visual(number))
        np.testing.assert_array_equal(mixed.texts(place), alone.texts(number))


def read_failures(corpus: Path) -> dict[str, str]:
    lines = (corpus / "failures.jsonl").read_text().splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def test_image_that_never_ends_is_given_up(tmp_path: Path) -> None:
    bomb = scan_bomb(tmp_path / "scans.jpg", 3000)
    limits = DecodeLimits(seconds=1.0)
    with pytest.raises(DecodeError, match=r"scans\.jpg took longer than 1 s"):
        decode(bomb, IMAGES, limits=limits)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "next.png")
    assert decode(tmp_path / "next.png", IMAGES)[1] == 1


def test_image_beyond_the_memory_limit_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (7000, 7000), "red").save(tmp_path / "large.png", compress_level=1)
    with pytest.raises(DecodeError, match=r"large\.png needs more memory"):
        decode(tmp_path / "large.png", IMAGES, limits=DecodeLimits(memory_gib=0.1))
    assert decode(tmp_path / "large.png", IMAGES)[1] == 1


@pytest.mark.parametrize("backend", ["ffmpeg", pytest.param("pyav", marks=pytest.mark.slow)])
def test_clip_beyond_the_memory_limit_is_refused(bomb: Path, backend: str) -> None:
    if backend == "pyav":
        pytest.importorskip("av")
    settings = CLIPS.model_copy(update={"backend": backend})
    with pytest.raises(DecodeError, match=r"bomb\.mkv .*more memory than is allowed"):
        decode(bomb, settings, limits=DecodeLimits(memory_gib=0.2))


def test_damage_after_the_window_gives_the_same_frames_every_time(
    clips: tuple[Path, list[Hostile]],
) -> None:
    for name in ("flipped-late.mp4", "cut-late.mp4"):
        taken = [decode(clips[0] / name, CLIPS)[0] for _ in range(5)]
        for frames in taken:
            np.testing.assert_array_equal(frames, decode(clips[0] / "tail.mp4", CLIPS)[0])
