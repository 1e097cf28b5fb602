"""The colours that stand for the classes of a sketch, for the eye and for the brush."""

from __future__ import annotations

import numpy as np
from PIL import ImageColor

from megatron_nuwa.models.segmentation import palette


def colour_names(classes: int) -> list[str]:
    """For each class the name of the CSS colour that is nearest to its own."""
    names = list(ImageColor.colormap)
    known = np.array([ImageColor.getrgb(name)[:3] for name in names], np.int32)
    distances = np.square(palette(classes)[:, None] - known).sum(-1)
    return [names[place] for place in distances.argmin(-1)]


def colours(classes: int) -> list[str]:
    """`#rrggbb` of each class."""
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in palette(classes).tolist()]


def coloured(maps: np.ndarray, classes: int) -> np.ndarray:
    """Class numbers (…, rows, columns) → uint8 (…, rows, columns, 3)."""
    return palette(classes)[maps]


def classes_of(pixels: np.ndarray, classes: int) -> np.ndarray:
    """The class of the nearest colour: uint8 (rows, columns, 3) → uint8 (rows, columns)."""
    # A brush's soft edge lies between two colours and becomes one of them. Few colours occur.
    found, place = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    distances = np.square(found[:, None].astype(np.int32) - palette(classes)).sum(-1)
    return distances.argmin(-1).astype(np.uint8)[place].reshape(pixels.shape[:-1])
