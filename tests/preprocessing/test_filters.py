"""Filters leave out what they say, count it, and do not depend on luck."""

from __future__ import annotations

import pickle
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from farm_media import WriteClip
from PIL import Image, ImageFilter

from megatron_nuwa.config import parse_settings
from megatron_nuwa.decoders import DecodeLimits, DecodeSettings, decode_image
from megatron_nuwa.errors import UserError
from preprocessing import look_alikes
from preprocessing.filters import (
    Candidate,
    FilteredError,
    FilterSettings,
    apply_filters,
    perceptual_hashes,
)
from preprocessing.isolation import Demands, decode_alone
from preprocessing.look_alikes import originals_of
from preprocessing.sources import SourceItem


def settings(*filters: dict[str, object]) -> FilterSettings:
    return parse_settings(FilterSettings, {"filters": list(filters)}, "recipe")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory, write_clip: WriteClip) -> dict[str, SourceItem]:
    folder = tmp_path_factory.mktemp("filters")
    clip = write_clip(folder / "clip.mp4", [20 * k for k in range(10)])
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (300, 100)).save(folder / "wide.jpg", exif=turned)
    return {
        "clip": SourceItem("clip", clip, ("a dog",)),
        "window": SourceItem("window", clip, ("a dog runs far",), 0.2, 0.6),
        "wide": SourceItem("wide", folder / "wide.jpg", ()),
        "gone": SourceItem("gone", folder / "gone.jpg", ("x",)),
    }


@pytest.mark.parametrize(
    ("rule", "left_out"),
    [
        ({"name": "minimum_size", "pixels": 48}, set()),
        ({"name": "minimum_size", "pixels": 49}, {"clip", "window"}),
        ({"name": "aspect_ratio", "largest": 2}, {"wide"}),
        ({"name": "duration", "shortest": 0.5}, {"window"}),
        ({"name": "duration", "longest": 0.9}, {"clip"}),
        ({"name": "caption_length", "fewest": 3}, {"clip", "wide"}),
        ({"name": "caption_length", "most": 3}, {"window", "wide"}),
    ],
)
def test_each_filter_leaves_out_what_it_says(
    items: dict[str, SourceItem], rule: dict[str, object], left_out: set[str]
) -> None:
    for name in ("clip", "window", "wide"):
        candidate = Candidate(items[name], ExitStack())
        if name not in left_out:
            apply_filters(settings(rule).filters, candidate)
            continue
        with pytest.raises(
            FilteredError, match=f"^filter '{rule['name']}': item '{name}': "
        ) as met:
            apply_filters(settings(rule).filters, candidate)
        assert str(met.value).startswith(f"filter '{rule['name']}': ")
        assert met.value.filter == rule["name"]
        assert str(pickle.loads(pickle.dumps(met.value))) == str(met.value)


def test_filters_are_asked_in_order_and_media_only_where_needed(
    items: dict[str, SourceItem],
) -> None:
    rules = settings({"name": "caption_length", "fewest": 9}, {"name": "duration"}).filters
    with pytest.raises(FilteredError, match="caption_length"):
        apply_filters(rules, Candidate(items["gone"], ExitStack()))
    with pytest.raises(UserError, match=r"gone\.jpg does not exist"):
        apply_filters(rules[1:], Candidate(items["gone"], ExitStack()))


def test_filters_hold_in_a_process_of_its_own_too(items: dict[str, SourceItem]) -> None:
    demands = Demands(
        DecodeSettings(image_size=16, frames=4, frames_per_second=10),
        DecodeLimits(),
        settings({"name": "caption_length", "fewest": 3}),
    )
    with pytest.raises(FilteredError, match=r"^filter 'caption_length': item 'clip': ") as met:
        decode_alone(items["clip"], demands)
    assert met.value.filter == "caption_length"
    assert decode_alone(items["window"], demands)[1] == 4


def test_facts_are_those_of_the_upright_medium(items: dict[str, SourceItem]) -> None:
    facts = Candidate(items["wide"], ExitStack()).facts
    assert (facts.width, facts.height, facts.seconds) == (100, 300, None)
    facts = Candidate(items["clip"], ExitStack()).facts
    assert (facts.kind, facts.width, facts.height, facts.seconds) == ("clip", 64, 48, 1.0)


def test_unknown_filter_is_refused() -> None:
    with pytest.raises(UserError, match=r"filters\.0"):
        settings({"name": "beauty"})
    with pytest.raises(UserError, match="pixels"):
        settings({"name": "minimum_size"})


def test_altered_copies_are_found_and_the_first_is_kept(tmp_path: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    pictures = [Image.fromarray(each).resize((96, 96), Image.Resampling.BICUBIC) for each in coarse]
    copies = [
        pictures[0],
        pictures[1],
        pictures[0].filter(ImageFilter.GaussianBlur(1)),
        pictures[2],
        pictures[1].resize((60, 60)),
        pictures[0],
    ]
    hashes = []
    for number, picture in enumerate(copies):
        picture.save(tmp_path / f"{number}.jpg", quality=60)
        frames = decode_image(tmp_path / f"{number}.jpg", DecodeSettings(image_size=64))
        hashes.append(perceptual_hashes(frames))
    assert originals_of(np.stack(hashes), 6).tolist() == [-1, -1, 0, -1, 1, 0]
    assert originals_of(np.stack(hashes)[1:], 6).tolist() == [-1, -1, -1, 0, 1]


@pytest.mark.parametrize("black", [(), (0,), (0, 1), (0, 2), "image"])
@pytest.mark.parametrize("distance", [0, 1, 3, 7, 15])
@pytest.mark.parametrize("at_once", [8, 1024])
def test_duplicates_are_those_that_comparing_all_pairs_finds(
    distance: int, black: tuple[int, ...] | str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Black frames give most clips the same hash, which must not make all of them alike."""
    monkeypatch.setattr(look_alikes, "_LEAF", at_once)
    monkeypatch.setattr(look_alikes, "_PAIRS_AT_ONCE", 10 * at_once)
    random = np.random.default_rng(distance)
    base = random.integers(0, 2**63, (40, 3), np.uint64)
    if isinstance(black, tuple):
        base[:30, black] = 0
    hashes = base[random.integers(0, 40, 300)]
    for row in hashes:
        for _ in range(random.integers(0, 2 * distance + 2)):
            row[random.integers(0, 3)] ^= np.uint64(1) << np.uint64(random.integers(0, 64))
    if black == "image":
        hashes[:] = hashes[:, :1]
    expected = [-1] * len(hashes)
    for row in range(len(hashes)):
        for earlier in range(row):
            bits = [
                int(a ^ b).bit_count() for a, b in zip(hashes[row], hashes[earlier], strict=True)
            ]
            if expected[earlier] < 0 and max(bits) <= distance:
                expected[row] = earlier
                break
    assert originals_of(hashes, distance).tolist() == expected
    assert originals_of(hashes[:0], distance).tolist() == []


def test_clips_that_begin_alike_are_not_duplicates() -> None:
    random = np.random.default_rng(1)
    first = random.integers(0, 256, (4, 32, 32, 3), np.uint8)
    second = np.concatenate([first[:1], random.integers(0, 256, (3, 32, 32, 3), np.uint8)])
    hashes = np.stack([perceptual_hashes(first), perceptual_hashes(second)])
    assert originals_of(hashes, 3).tolist() == [-1, -1]
    assert originals_of(hashes[[0, 0]], 3).tolist() == [-1, 0]


def test_a_million_clips_of_which_many_begin_black_are_compared_in_seconds() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, (1_000_000, 3), np.uint64)
    for frame in (0, 2):
        hashes[random.random(len(hashes)) < 0.1, frame] = 0
    copies = random.choice(500_000, 20_000, replace=False)
    hashes[500_000 + copies] = hashes[copies] ^ np.uint64(5)
    began = time.process_time()
    originals = originals_of(hashes, 3)
    # Comparing all with all would take days.
    assert time.process_time() - began < 60
    assert (originals[500_000 + copies] == copies).all()
    assert (originals >= 0).sum() == len(copies)


def test_many_that_look_like_each_other_are_not_compared_pair_by_pair() -> None:
    """Pictures that are all blank but for noise: a hundred thousand have five thousand million."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 64, (100_000, 3)).astype(np.uint64)
    began = time.process_time()
    originals = originals_of(np.uint64(1) << noise, 3)
    assert time.process_time() - began < 30
    assert (originals[1:] == 0).all()
