"""Colours that stand for the classes of a sketch."""

from __future__ import annotations

import colorsys

import numpy as np

# Told apart by most eyes, and named so that one can speak of them.
_NAMED = (
    ("black", "#1b1b1f"),
    ("blue", "#3574d4"),
    ("orange", "#ee8530"),
    ("green", "#3aa35b"),
    ("red", "#d63f3f"),
    ("purple", "#9359c9"),
    ("yellow", "#efca3d"),
    ("cyan", "#3fbcc8"),
    ("pink", "#ec86b4"),
    ("brown", "#8a5a3b"),
    ("white", "#f3f1ec"),
    ("grey", "#8c8f96"),
)
_GOLDEN_RATIO = 0.61803


def colour_names(classes: int) -> list[str]:
    """A name for the colour of each class."""
    names = [name for name, _ in _NAMED[:classes]]
    return names + [f"colour {number}" for number in range(len(names), classes)]


def colours(classes: int) -> list[str]:
    """`#rrggbb` of each class: different ones for at least a few hundred classes."""
    found = [colour for _, colour in _NAMED[:classes]]
    for number in range(len(found), classes):
        hue, ring = number * _GOLDEN_RATIO % 1, number % 3
        red, green, blue = colorsys.hsv_to_rgb(
            hue, (0.75, 0.5, 0.9)[ring], (0.85, 0.95, 0.55)[ring]
        )
        found.append(f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}")
    return found


def coloured(maps: np.ndarray, classes: int) -> np.ndarray:
    """Class numbers (…, rows, columns) → uint8 (…, rows, columns, 3)."""
    return _table(classes)[maps]


def classes_of(pixels: np.ndarray, classes: int) -> np.ndarray:
    """The class of the nearest colour: uint8 (rows, columns, 3) → uint8 (rows, columns)."""
    # A brush's soft edge lies between two colours and becomes one of them. Few colours occur.
    found, place = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    distances = np.square(found[:, None].astype(np.int32) - _table(classes)).sum(-1)
    return distances.argmin(-1).astype(np.uint8)[place].reshape(pixels.shape[:-1])


def _table(classes: int) -> np.ndarray:
    return np.array(
        [
            [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
            for colour in colours(classes)
        ],
        np.uint8,
    )
