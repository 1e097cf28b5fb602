"""Regions of a picture that are to be made new: drawn in pixels, kept or redrawn in whole cells."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from megatron_nuwa.errors import UserError

# Sums of fractions of pixels are compared with a little slack.
_SLACK = 1e-6


def check_fits(
    shape: tuple[int, int], size: tuple[int, int], fit: Literal["crop", "exact"], name: str
) -> None:
    """`UserError` naming a picture that is not to be fitted to the model's `size`.

    `shape` and `size` are (rows, columns). With `fit` crop it may be larger, and is scaled and
    centre-cropped as long as half of it remains; exact asks for the size itself.
    """
    found, wanted = (f"{columns} × {rows}" for rows, columns in (shape, size))
    if fit == "exact" and shape != size:
        raise UserError(f"{name} is {found} pixels, and the model draws {wanted}")
    if shape[0] < size[0] or shape[1] < size[1]:
        raise UserError(
            f"{name} is {found} pixels, and the model draws {wanted}: give one that is at least as "
            "large"
        )
    scale = min(shape[0] / size[0], shape[1] / size[1])
    if size[0] * size[1] * scale**2 < shape[0] * shape[1] / 2:
        raise UserError(
            f"{name} is {found} pixels: to draw {wanted}, more than half of it would be cut away; "
            "crop it to what matters first"
        )


def touched(region: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which of `rows` × `columns` equal parts of a picture a region touches.

    bool (…, height, width) → bool (…, rows, columns). Of a picture of another shape than the
    parts', the middle counts that a centre crop leaves: this is how pictures themselves are fitted.
    """
    height, width = region.shape[-2:]
    scale = min(height / rows, width / columns)
    for axis, length, parts in ((-2, height, rows), (-1, width, columns)):
        first = (length - scale * parts) / 2
        edges = first + scale * np.arange(parts + 1)
        starts = np.floor(edges[:-1] + _SLACK).astype(int).clip(0, length)
        stops = np.ceil(edges[1:] - _SLACK).astype(int).clip(0, length)
        sums = np.cumsum(region, axis=axis, dtype=np.int64)
        sums = np.concatenate([np.zeros_like(np.take(sums, [0], axis)), sums], axis)
        region = np.take(sums, stops, axis) > np.take(sums, starts, axis)
    return region


def rectangle(text: str, width: int, height: int, field: str) -> np.ndarray:
    """The region bool (height, width) of `x0,y0,x1,y1`, in pixels or in fractions of the sides.

    Numbers of at most 1 are fractions. Raises `UserError` naming `field`, the argument.
    """
    try:
        x0, y0, x1, y1 = numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{field} '{text}' must be four numbers x0,y0,x1,y1, such as 0.5,0,1,1 for the right "
            "half"
        ) from None
    if not all(math.isfinite(number) for number in numbers) or x0 >= x1 or y0 >= y1:
        raise UserError(
            f"{field} '{text}' has no area: x0 must be left of x1, and y0 above y1, in x0,y0,x1,y1"
        )
    if max(numbers) <= 1:
        x0, x1, y0, y1 = x0 * width, x1 * width, y0 * height, y1 * height
    if min(x0, y0) < 0 or x1 > width or y1 > height:
        raise UserError(
            f"{field} '{text}' reaches outside the picture, which is {width} pixels wide and "
            f"{height} high"
        )
    region = np.zeros((height, width), bool)
    left, top = min(round(x0), width - 1), min(round(y0), height - 1)
    region[top : max(round(y1), top + 1), left : max(round(x1), left + 1)] = True
    return region


def frame_range(text: str, frames: int, field: str) -> slice:
    """The frames of `first:end`, counted from 0, `end` not among them; either may be left out.

    Raises `UserError` naming `field`, the argument.
    """
    first, separator, end = text.partition(":")
    try:
        if not separator:
            raise ValueError
        start, stop = int(first or 0), int(end or frames)
    except ValueError:
        raise UserError(
            f"{field} '{text}' must be FIRST:END, such as 3:8 for the frames 3 to 7"
        ) from None
    if not 0 <= start < stop <= frames:
        raise UserError(
            f"{field} '{text}' must lie within the clip's {frames} frames, which are counted from 0"
        )
    return slice(start, stop)


def check_frames(region: np.ndarray, frames: int) -> None:
    """`UserError` for a region (frames, …) that has neither one frame nor as many as these."""
    if len(region) not in (1, frames):
        raise UserError(
            f"the mask has {len(region)} frames: give one for all, or one for each of the {frames}"
        )


def composite(new: np.ndarray, original: np.ndarray, region: np.ndarray) -> np.ndarray:
    """`new` where the region is, the original's own pixels elsewhere.

    Both uint8 (frames, rows, columns, 3); `region` bool (frames or 1, rows, columns).
    """
    return np.where(region[..., None], new, original)


def outline(region: np.ndarray) -> np.ndarray:
    """The region's outermost pixels: bool of its shape (…, rows, columns)."""
    padded = np.pad(region, [(0, 0)] * (region.ndim - 2) + [(1, 1), (1, 1)])
    inner = padded[..., 1:-1, 1:-1].copy()
    for rows, columns in ((slice(0, -2), slice(1, -1)), (slice(2, None), slice(1, -1))):
        inner &= padded[..., rows, columns]
        inner &= padded[..., columns, rows]
    return region & ~inner
