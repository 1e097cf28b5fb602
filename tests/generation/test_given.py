"""What generation starts from, as its files are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.given import Given, read_mask

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
