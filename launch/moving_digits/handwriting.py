"""Real handwritten digits, from the file that the package scikit-learn carries."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from launch.workflow.media import find_package_file
from megatron_nuwa.errors import UserError

PACKAGE, PATH = "scikit-learn", "sklearn/datasets/data/digits.csv.gz"
_SIDE = 8
_LARGEST_VALUE = 16
# The file goes from writer to writer, so its last quarter is by other hands than the rest.
_TRAIN_SHARE = 0.75


@dataclass(frozen=True)
class Handwriting:
    """Digits as ink from 0 to 1, float32 (samples, size, size), and what they are, (samples,)."""

    ink: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def random_sample(self, digit: int, random: np.random.Generator) -> np.ndarray:
        """The ink of one of the samples of a digit, (size, size)."""
        return self.ink[random.choice(np.flatnonzero(self.labels == digit))]


def read_handwriting(size: int, *, held_out: bool) -> Handwriting:
    """The train or the held-out samples, smoothly enlarged to `size` pixels a side.

    Raises `UserError` where the package is missing or its file is not the known one.
    """
    path = find_package_file(PACKAGE, PATH)
    ink, labels = _read(path)
    split = int(len(labels) * _TRAIN_SHARE)
    part = slice(split, None) if held_out else slice(None, split)
    return Handwriting(np.stack([enlarged(one, size) for one in ink[part]]), labels[part])


def enlarged(ink: np.ndarray, size: int) -> np.ndarray:
    """Ink (rows, columns) from 0 to 1 at another size, by a smooth filter."""
    picture = Image.fromarray(ink.astype(np.float32))
    resized = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32).clip(0, 1)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(path, "rt") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.float32, ndmin=2)
    if table.shape[1] != _SIDE**2 + 1 or table.min() < 0 or table.max() > _LARGEST_VALUE:
        raise UserError(f"{path} is not the table of digits that {PACKAGE} is known for")
    pixels = table[:, :-1].reshape(-1, _SIDE, _SIDE) / _LARGEST_VALUE
    return pixels, table[:, -1].astype(np.int64)
