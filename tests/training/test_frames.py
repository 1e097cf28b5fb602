"""Frames: the cache on disk, and batches that depend on seed and step alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nuwa.errors import MachineError, UserError
from megatron_nuwa.training import frames as frames_room
from megatron_nuwa.training.frame_cache import cache_frames
from megatron_nuwa.training.frames import (
    CachedFrames,
    DecodedFrames,
    Draw,
    MediaFrames,
    batches,
    load,
    to_bytes,
    to_images,
)
from megatron_nuwa.training.image_quality import psnr, ssim


def media(items: list[int], key: str = "k") -> MediaFrames:
    """Item n has n frames of the value n; item 0 is broken."""

    def decode(item: object) -> np.ndarray:
        assert isinstance(item, int)
        if item == 0:
            raise UserError("item 0 cannot be decoded")
        return np.full((item, 8, 8, 3), item, np.uint8)

    return MediaFrames(items, decode, 8, lambda go_on: key, "test frames")


def numbered(tmp_path: Path, count: int) -> CachedFrames:
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    np.save(tmp_path / "numbered.npy", frames)
    return CachedFrames(tmp_path / "numbered.npy")


def test_cache_holds_all_real_frames_and_names_the_broken_items(tmp_path: Path) -> None:
    path = tmp_path / "frames.npy"
    report = cache_frames(media([1, 0, 3, 2]), path)
    assert (report.frames, report.items, report.reused) == (6, 4, False)
    assert report.failures == ["item 0 cannot be decoded"]
    stored = np.load(path)
    assert stored.shape == (6, 8, 8, 3)
    assert stored[:, 0, 0, 0].tolist() == [1, 3, 3, 3, 2, 2]
    assert len(CachedFrames(path)) == 6


def test_cache_is_reused_until_its_key_changes(tmp_path: Path) -> None:
    path = tmp_path / "frames.npy"
    cache_frames(media([1]), path)
    assert cache_frames(media([2]), path)[:3] == (1, 1, [])
    other = cache_frames(media([2], key="other"), path)
    assert (other.frames, other.items, other.reused) == (2, 1, False)


def test_nothing_decodable_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test frames: none of the 2 items can be decoded"):
        cache_frames(media([0, 0]), tmp_path / "frames.npy")
    assert list(tmp_path.iterdir()) == []


def test_decoding_on_the_fly_passes_over_broken_items() -> None:
    dataset = DecodedFrames(media([1, 0, 0, 4]))
    assert dataset[Draw(1, 7)].broken == 2
    assert dataset[Draw(1, 7)].frame[0, 0, 0] == 4
    with pytest.raises(UserError, match="2 items in a row cannot be decoded"):
        DecodedFrames(media([0, 0]))[Draw(0, 0)]


def test_a_fault_of_the_machine_makes_no_item_broken() -> None:
    def decode(item: object) -> np.ndarray:
        raise MachineError("no ffmpeg here")

    refused = MediaFrames([1, 2], decode, 8, lambda go_on: "k", "test frames")
    with pytest.raises(MachineError, match=r"^no ffmpeg here$"):
        next(load(DecodedFrames(refused), [[Draw(0, 0)]], workers=0))


def test_batches_depend_on_seed_and_step_and_not_on_the_number_of_processes(
    tmp_path: Path,
) -> None:
    dataset = numbered(tmp_path, 10)

    def seen(rank: int, world_size: int, first_step: int = 0, seed: int = 3) -> list[list[float]]:
        found = batches(
            dataset,
            image_size=8,
            flip=False,
            seed=seed,
            batch_size=4,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
            steps=5,
            workers=0,
        )
        return [batch.frames[:, 0, 0, 0].tolist() for batch in found]

    alone = seen(0, 1)
    two = [first + second for first, second in zip(seen(0, 2), seen(1, 2), strict=True)]
    assert alone == two
    assert seen(0, 1, first_step=3) == alone[3:]
    assert seen(0, 1, seed=4) != alone
    # Five steps of four are two whole passes over ten frames.
    flat = [value for step in alone for value in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_crops_and_mirrors_are_parts_of_the_frame(tmp_path: Path) -> None:
    frame = np.arange(144, dtype=np.uint8).reshape(1, 12, 12, 1).repeat(3, axis=3)
    np.save(tmp_path / "one.npy", frame)
    found = batches(
        CachedFrames(tmp_path / "one.npy"),
        image_size=8,
        flip=True,
        seed=0,
        batch_size=16,
        rank=0,
        world_size=1,
        first_step=0,
        steps=1,
        workers=0,
    )
    crops = next(iter(found)).frames.numpy()[..., 0]
    possible = {}
    for top in range(5):
        for left in range(5):
            crop = frame[0, top : top + 8, left : left + 8, 0]
            possible[crop.tobytes()] = "plain"
            possible[crop[:, ::-1].tobytes()] = "mirrored"
    kinds = [possible[crop.tobytes()] for crop in crops]
    assert {"plain", "mirrored"} == set(kinds)
    assert len({crop.tobytes() for crop in crops}) > 8


def test_bytes_survive_the_way_to_images_and_back() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    images = to_images(frames)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert np.array_equal(to_bytes(images), frames.numpy())


@pytest.mark.parametrize("shift", [1, 10, 64])
def test_psnr_of_a_constant_error(shift: int) -> None:
    black = to_images(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    shifted = to_images(torch.full((2, 8, 8, 3), shift, dtype=torch.uint8))
    expected = 20 * np.log10(255 / shift)
    assert psnr(shifted, black).tolist() == pytest.approx([expected] * 2, abs=1e-4)
    assert psnr(black, black).tolist() == [100, 100]


def ssim_of_windows(found: np.ndarray, wanted: np.ndarray) -> float:
    """The definition, window by window, of one channel in [0, 1]."""
    places = np.arange(11) - 5
    weights = np.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(found.shape[0] - 10):
        for left in range(found.shape[1] - 10):
            a, b = (p[top : top + 11, left : left + 11] for p in (found, wanted))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 0.01**2)
                * (2 * both + 0.03**2)
                / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))
            )
    return float(np.mean(values))


def test_ssim_is_its_published_definition_window_by_window() -> None:
    random = np.random.default_rng(0)
    wanted = random.integers(0, 256, (2, 16, 19, 3)).astype(np.uint8)
    noisy = np.clip(wanted + random.normal(0, 40, wanted.shape), 0, 255).astype(np.uint8)
    found = ssim(to_images(torch.from_numpy(noisy)), to_images(torch.from_numpy(wanted)))
    for frame in range(2):
        channels = [
            ssim_of_windows(noisy[frame, ..., c] / 255, wanted[frame, ..., c] / 255)
            for c in range(3)
        ]
        assert float(found[frame]) == pytest.approx(np.mean(channels), abs=1e-7)
    images = to_images(torch.from_numpy(wanted))
    assert ssim(images, images).tolist() == pytest.approx([1, 1])
    # A side below the window's.
    assert ssim(images[..., :8], images[..., :8]).tolist() == pytest.approx([1, 1])


def test_maps_are_cached_cropped_and_mirrored_as_numbers(tmp_path: Path) -> None:
    maps = np.arange(100, dtype=np.uint8).reshape(1, 10, 10)
    source = MediaFrames([1], lambda item: maps, 10, lambda go_on: "k", "test maps", are_maps=True)
    assert cache_frames(source, tmp_path / "maps.npy").frames == 1
    dataset = CachedFrames(tmp_path / "maps.npy")
    assert np.array_equal(dataset[Draw(0, 0)].frame, maps[0])
    sizes = {"image_size": 8, "batch_size": 16, "first_step": 0, "steps": 1}
    found = batches(dataset, flip=True, seed=0, rank=0, world_size=1, workers=0, **sizes)
    crops = next(iter(found)).frames
    assert crops.dtype == torch.uint8
    corners = {(int(crop[0, 0]), int(crop[0, 7]), int(crop[7, 0])) for crop in crops}
    plain = {
        (a, a + 7, a + 70) for a in (10 * row + column for row in range(3) for column in range(3))
    }
    mirrored = {(b, a, b + 70) for a, b, _ in plain}
    assert corners <= plain | mirrored
    assert corners & plain
    assert corners & mirrored


def test_no_workers_are_started_for_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames_room, "DataLoader", None)
    options = {"image_size": 8, "flip": False, "seed": 0, "batch_size": 4, "rank": 0}
    found = batches(
        numbered(tmp_path, 10), first_step=3, steps=3, world_size=1, workers=2, **options
    )
    assert list(found) == []


def test_crops_follow_from_step_and_process_alone(tmp_path: Path) -> None:
    frame = np.arange(144, dtype=np.uint8).reshape(1, 12, 12, 1).repeat(3, axis=3)
    np.save(tmp_path / "one.npy", frame)

    def crops(rank: int, first_step: int) -> list[list[int]]:
        options = {"image_size": 8, "flip": True, "seed": 0, "batch_size": 32, "workers": 0}
        found = batches(
            CachedFrames(tmp_path / "one.npy"),
            rank=rank,
            world_size=2,
            first_step=first_step,
            steps=3,
            **options,  # type: ignore[arg-type]
        )
        return [batch.frames[:, 0, 0, 0].tolist() for batch in found]

    steps = crops(0, 0) + crops(1, 0)
    assert len({tuple(step) for step in steps}) == 6
    # A run that continues cuts as the one that was not stopped.
    assert crops(0, 2) == steps[2:3]
