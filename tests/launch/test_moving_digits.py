"""The data of moving digits: captions held out, writers kept apart, paths, files, sketches."""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.moving_digits.handwriting import read_handwriting
from launch.moving_digits.media import prompt_lists, write_clips, write_media
from launch.moving_digits.motion_reading import read_motion
from launch.moving_digits.motions import (
    DIGITS,
    MOTIONS,
    STEPS,
    digit_of,
    image_caption,
    offsets,
    scene_of,
    scenes,
)
from launch.moving_digits.world import World, draw, path
from megatron_nuwa.decoders import DecodeSettings, decode, decode_sketch
from megatron_nuwa.errors import UserError

COUNTS = {
    **{"train-clips": 130, "train-images": 12, "train-frames": 30},
    **{"heldout-clips": 34, "heldout-images": 11, "heldout-frames": 10},
}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def media(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "media"
    write_media(folder, world, COUNTS, seed=0)
    return folder


def rows(media: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (media / f"{name}.jsonl").read_text().splitlines()]


def test_a_fifth_of_the_captions_is_held_out_and_every_part_of_them_is_trained_on() -> None:
    trained, held_out = scenes(held_out=False), scenes(held_out=True)
    assert len(held_out) / len(scenes()) == pytest.approx(0.2)
    assert not {scene.caption for scene in trained} & {scene.caption for scene in held_out}
    assert {scene.digit for scene in trained} == set(range(DIGITS))
    assert {scene.motion for scene in trained} == set(MOTIONS)
    # Each part is asked for among the held-out ones too, and no part is left out by much.
    assert set(Counter(scene.motion for scene in held_out).values()) == {2}
    assert set(Counter(scene.digit for scene in held_out).values()) == {3, 4}


def test_a_caption_says_its_scene_and_no_two_say_the_same() -> None:
    assert len({scene.caption for scene in scenes()}) == DIGITS * len(MOTIONS)
    for scene in scenes():
        assert scene_of(scene.caption) == scene
    assert [digit_of(image_caption(digit)) for digit in range(DIGITS)] == list(range(DIGITS))
    assert scene_of("the digit 7 moves left, then up").motion == ("left", "up")
    for unknown in ("a dog runs", "the digit 7 moves left, then left"):
        with pytest.raises(UserError, match="no caption of moving digits"):
            scene_of(unknown)
    with pytest.raises(UserError, match="no caption of a digit"):
        digit_of("the digit 12")


def test_train_and_held_out_digits_are_different_samples_of_all_digits() -> None:
    train, held_out = (read_handwriting(8, held_out=which) for which in (False, True))
    assert len(train) + len(held_out) == 1797
    assert set(train.labels) == set(held_out.labels) == set(range(DIGITS))
    seen = {sample.tobytes() for sample in train.ink}
    assert not seen & {sample.tobytes() for sample in held_out.ink}


@pytest.mark.parametrize("sizes", [{}, {"side": 64, "digit": 24, "frames": 9, "raster": 1}])
def test_every_path_stays_inside_and_goes_the_asked_way(sizes: dict[str, int]) -> None:
    world = World(**sizes)
    random = np.random.default_rng(0)
    starts = set()
    for motion in MOTIONS:
        for _ in range(60):
            corners = path(world, motion, random)
            assert corners.shape == (world.frames, 2)
            assert corners.min() >= 0
            assert corners.max() <= world.side - world.digit
            moves = np.diff(corners, axis=0) / world.step
            half = (world.frames - 1) // 2
            assert (moves[:half] == STEPS[motion[0]]).all()
            assert (moves[half:] == STEPS[motion[1]]).all()
            starts.add(tuple(corners[0]))
    assert (np.array(list(starts)) % world.raster == 0).all()
    # Every motion has room from every start, so the starts are the same for all.
    assert len(starts) == ((world.side - world.digit - 2 * world.reach) // world.raster + 1) ** 2


def test_a_world_in_which_no_path_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 38 pixels; the side is 36"):
        World(digit=22)
    with pytest.raises(ValueError, match="frames must be odd"):
        World(frames=4)
    with pytest.raises(ValueError, match="step 4 must be a multiple of raster 3"):
        World(raster=3)


def test_the_same_seed_writes_the_same_bytes(media: Path, world: World, tmp_path: Path) -> None:
    write_media(tmp_path / "again", world, COUNTS, seed=0)
    files = sorted(path.relative_to(media) for path in media.rglob("*") if path.is_file())
    assert len(files) == 2 * sum(COUNTS.values()) + len(COUNTS) + len(prompt_lists()) + 1
    for name in files:
        assert (media / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_clips_show_what_their_captions_say(media: Path, world: World) -> None:
    settings = DecodeSettings(
        image_size=world.side, frames=world.frames, frames_per_second=world.frames_per_second
    )
    for row in rows(media, "heldout-clips"):
        [caption] = row["captions"]  # type: ignore[misc]
        frames, real = decode(media / str(row["media"]), settings)
        assert real == world.frames
        assert read_motion(frames, world).motion == scene_of(caption).motion


def test_a_clip_holds_the_drawn_pixels(world: World, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    digits = read_handwriting(world.digit, held_out=True)
    clips = np.stack([draw(world, ink, path(world, MOTIONS[5], random)) for ink in digits.ink[:3]])
    write_clips(tmp_path, ["a", "b", "c"], clips, world)
    settings = DecodeSettings(
        image_size=world.side, frames=world.frames, frames_per_second=world.frames_per_second
    )
    for name, clip in zip("abc", clips, strict=True):
        frames, _ = decode(tmp_path / f"{name}.mp4", settings)
        # Video keeps 219 levels of grey.
        assert np.abs(frames.astype(int) - clip[..., None]).max() <= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]


def test_no_held_out_caption_is_trained_on_and_all_trained_ones_are(media: Path) -> None:
    trained = {str(row["captions"]) for row in rows(media, "train-clips")}
    held_out = {str(row["captions"]) for row in rows(media, "heldout-clips")}
    assert len(trained) == len(scenes(held_out=False))
    assert len(held_out) == len(scenes(held_out=True))
    assert not trained & held_out
    listed = (media / "heldout-captions.txt").read_text().splitlines()
    assert {str([caption]) for caption in listed} == held_out


def test_sketches_cover_the_ink_with_the_digits_class(media: Path, world: World) -> None:
    clip = DecodeSettings(
        image_size=world.side, frames=world.frames, frames_per_second=world.frames_per_second
    )
    image = DecodeSettings(image_size=world.side)
    for name, settings in (("heldout-clips", clip), ("heldout-images", image)):
        for row in rows(media, name)[:11]:
            [caption] = row["captions"]  # type: ignore[misc]
            digit = digit_of(caption) if settings is image else scene_of(caption).digit
            frames, _ = decode(media / str(row["media"]), settings)
            maps, real = decode_sketch(media / str(row["sketch"]), settings, DIGITS + 1)
            assert real == settings.frames
            assert set(np.unique(maps)) == {0, digit + 1}
            ink = frames[..., 0] / 255
            assert ink[maps > 0].min() > 0.2
            assert ink[maps == 0].max() < 0.3


def test_offsets_begin_at_the_start() -> None:
    assert offsets(("left", "up"), 5, 4).tolist() == [[0, 0], [0, -4], [0, -8], [-4, -8], [-8, -8]]


def test_what_is_missing_or_in_the_way_is_named(
    media: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds other files"):
        write_media(tmp_path / "mine", world, COUNTS, seed=0)
    with pytest.raises(UserError, match="train-clips must be at least 1, not 0"):
        write_media(tmp_path / "new", world, {"train-clips": 0}, seed=0)

    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match=r"'scikit-learn'.*demo-media\.txt"):
        write_media(tmp_path / "new", world, COUNTS, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
