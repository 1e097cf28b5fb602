"""From drawn regions to cells."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.regions import (
    check_fits,
    composite,
    frame_range,
    outline,
    rectangle,
    touched,
)


def brute_force(region: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Every part, every pixel: does the pixel's square overlap the part's?"""
    height, width = region.shape
    scale = min(height / rows, width / columns)
    top, left = (height - scale * rows) / 2, (width - scale * columns) / 2
    found = np.zeros((rows, columns), bool)
    for i, j in np.ndindex(rows, columns):
        for y, x in zip(*np.nonzero(region), strict=True):
            over_y = min(y + 1, top + (i + 1) * scale) - max(y, top + i * scale)
            over_x = min(x + 1, left + (j + 1) * scale) - max(x, left + j * scale)
            found[i, j] |= bool(min(over_x, over_y) > 1e-6)
    return found


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (20, 24), (31, 17), (9, 13)], ids=str)
@pytest.mark.parametrize("parts", [(4, 4), (3, 5), (8, 8)], ids=str)
def test_a_part_is_touched_when_any_pixel_overlaps_it(
    shape: tuple[int, int], parts: tuple[int, int]
) -> None:
    random = np.random.default_rng(sum(shape))
    for share in (0.02, 0.3):
        region = random.random(shape) < share
        assert np.array_equal(touched(region, *parts), brute_force(region, *parts))
    stack = random.random((3, *shape)) < 0.1
    separately = [touched(region, *parts) for region in stack]
    assert np.array_equal(touched(stack, *parts), np.stack(separately))


def test_one_thin_line_is_not_lost_between_the_pixels() -> None:
    region = np.zeros((336, 336), bool)
    region[100, :] = True
    assert touched(region, 21, 21).sum() == 21
    assert touched(region, 21, 21)[6].all()


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("0.5,0,1,1", (0, 20, 12, 24)),
        ("0,0,1,1", (0, 20, 0, 24)),
        ("2,3,10,9", (3, 9, 2, 10)),
        ("0.001,0.5,0.002,0.51", (10, 11, 0, 1)),
    ],
)
def test_rectangles_are_in_pixels_or_fractions(text: str, box: tuple[int, ...]) -> None:
    expected = np.zeros((20, 24), bool)
    expected[box[0] : box[1], box[2] : box[3]] = True
    assert np.array_equal(rectangle(text, 24, 20, "--region"), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", "must be four numbers"),
        ("a,b,c,d", "must be four numbers"),
        ("0.5,0,0.5,1", "has no area"),
        ("0,0,nan,1", "has no area"),
        ("0,0,25,20", "outside the picture, which is 24 pixels wide and 20 high"),
        ("-1,0,5,5", "outside the picture"),
    ],
)
def test_other_rectangles_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rectangle(text, 24, 20, "--region")


def test_frame_ranges() -> None:
    assert [frame_range(text, 8, "--f") for text in ("3:8", ":2", "5:", ":")] == [
        slice(3, 8),
        slice(0, 2),
        slice(5, 8),
        slice(0, 8),
    ]
    for text in ("3", "a:b", "3:3", "2:9", "-1:2"):
        with pytest.raises(UserError, match="--f"):
            frame_range(text, 8, "--f")


def test_pixels_outside_the_region_are_the_originals_own() -> None:
    new, old = np.full((2, 4, 4, 3), 9, np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    region = np.zeros((1, 4, 4), bool)
    region[0, 1:3, 1:3] = True
    joined = composite(new, old, region)
    assert (joined[:, 1:3, 1:3] == 9).all()
    assert joined.sum() == 9 * 2 * 4 * 3


def test_an_outline_is_the_regions_own_border() -> None:
    region = np.zeros((1, 6, 6), bool)
    region[0, 1:5, 2:6] = True
    expected = region.copy()
    expected[0, 2:4, 3:5] = False
    assert np.array_equal(outline(region), expected)


@pytest.mark.parametrize(
    ("shape", "fit", "message"),
    [
        ((64, 64), "exact", None),
        ((64, 100), "crop", None),
        ((500, 260), "crop", None),
        ((64, 65), "exact", "x is 65 × 64 pixels, and the model draws 64 × 64"),
        ((64, 63), "crop", "at least as large"),
        ((100, 201), "crop", "more than half of it would be cut away"),
    ],
)
def test_pictures_of_the_wrong_size_are_refused(
    shape: tuple[int, int], fit: str, message: str | None
) -> None:
    if message is None:
        check_fits(shape, (64, 64), fit, "x")  # type: ignore[arg-type]
        return
    with pytest.raises(UserError, match=message):
        check_fits(shape, (64, 64), fit, "x")  # type: ignore[arg-type]
