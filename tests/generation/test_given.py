"""What generation starts from, as its files are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.given import Given, read_given_sketch, read_mask

GIVEN = Given(Path("photo.png"), np.zeros((1, 16, 16, 3), np.uint8), (40, 40))
RIGHT_HALF = np.arange(16) >= 8


@pytest.mark.parametrize("name", ["mask.png", "mask.tif"])
def test_a_masks_16_bits_are_scaled_to_8(tmp_path: Path, name: str) -> None:
    """Dark grey, 15 % of white, is no white."""
    mask = np.full((40, 40), 10_000, np.uint16)
    mask[:, 20:] = 65_535
    Image.fromarray(mask).save(tmp_path / name)
    region = read_mask(tmp_path / name, GIVEN, (16, 16))
    assert np.array_equal(region, np.broadcast_to(RIGHT_HALF, (1, 16, 16)))


def test_a_mask_of_floating_point_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    Image.fromarray(np.ones((40, 40), np.float32)).save(path)
    with pytest.raises(UserError) as caught:
        read_mask(path, GIVEN, (16, 16))
    assert str(caught.value) == (
        f"{path} cannot be decoded as an image: it has floating-point pixels, of which nobody "
        "knows what is white"
    )


def write_maps(path: Path, *shape: int) -> np.ndarray:
    maps = np.random.default_rng(0).integers(0, 5, shape).astype(np.uint8)
    np.save(path, maps)
    return maps


def test_a_sketchs_unlabelled_pixels_become_the_last_class_as_in_a_corpus(
    generate, tmp_path: Path
) -> None:
    maps = np.zeros((16, 16), np.uint8)
    maps[:, 8:] = 255
    Image.fromarray(maps).save(tmp_path / "map.png")
    with pytest.raises(UserError, match=r"class 255 .*--sketch-unlabelled 255"):
        generate("s2i", "--sketch", tmp_path / "map.png")
    (entry,) = generate("s2i", "--sketch", tmp_path / "map.png", "--sketch-unlabelled", 255)
    assert entry["sketch_unlabelled"] == 255
    found = read_given_sketch(tmp_path / "map.png", 16, 5, 1, unlabelled=255)
    assert np.array_equal(found[0], np.where(maps == 255, 4, 0))
    with pytest.raises(UserError, match="takes no --sketch-unlabelled"):
        generate("t2i", "--prompt", "x", "--sketch-unlabelled", 255)


@pytest.mark.parametrize(
    ("shape", "fit", "message"),
    [
        ((16, 144), "crop", "is 144 × 16 pixels: .* more than half of it would be cut away"),
        ((8, 8), "crop", "is 8 × 8 pixels, and the model draws 16 × 16: give one that is at least"),
        ((20, 20), "exact", "is 20 × 20 pixels, and the model draws 16 × 16"),
    ],
)
@pytest.mark.parametrize("name", ["map.npy", "map.png"])
def test_sketches_of_the_wrong_size_are_refused_like_pictures(
    generate, tmp_path: Path, name: str, shape: tuple[int, int], fit: str, message: str
) -> None:
    maps = write_maps(tmp_path / "map.npy", *shape)
    Image.fromarray(maps).save(tmp_path / "map.png")
    with pytest.raises(UserError, match=message):
        generate("s2i", "--sketch", tmp_path / name, "--fit", fit)


def test_maps_are_one_for_all_frames_or_one_for_each(generate, tmp_path: Path) -> None:
    maps = write_maps(tmp_path / "maps.npy", 2, 16, 16)
    with pytest.raises(UserError) as caught:
        generate("s2v", "--sketch", tmp_path / "maps.npy")
    assert str(caught.value) == (
        f"{tmp_path / 'maps.npy'} has 2 maps, and 3 frames are drawn: give one map for all frames, "
        "or one for each"
    )
    assert np.array_equal(read_given_sketch(tmp_path / "maps.npy", 16, 5, 2), maps)
    np.save(tmp_path / "still.npy", maps[0])
    still = read_given_sketch(tmp_path / "still.npy", 16, 5, 3)
    assert np.array_equal(still, np.stack([maps[0]] * 3))
