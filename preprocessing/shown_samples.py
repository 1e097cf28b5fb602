"""A few items of all that one rank has decoded, for the report."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from preprocessing.sources import SourceItem

SAMPLES = 6


@dataclass(frozen=True)
class Sample:
    """An item as the report shows it: first, middle and last frame, uint8 (frames, H, W, 3).

    `maps`, uint8 (frames, H, W), are of the same moments of its sketch, if it has one.
    """

    item: SourceItem
    frames: np.ndarray
    maps: np.ndarray | None = None


class Samples:
    """Every item that was offered is among them with the same chance, whenever one stops.

    The first items of a manifest are often the clips of one film.
    """

    def __init__(self, most: int = SAMPLES) -> None:
        self._most = most
        self._offered = 0
        # A generator of its own: nothing else in the farm may depend on what is shown.
        self._chance = random.Random(0)
        self._kept: list[tuple[int, Sample]] = []

    def offer(
        self, row: int, item: SourceItem, frames: np.ndarray, maps: np.ndarray | None
    ) -> None:
        """Perhaps keep an item of a row of the plan, in place of another one."""
        self._offered += 1
        place = len(self._kept)
        if place == self._most:
            place = self._chance.randrange(self._offered)
        if place < self._most:
            picks = sorted({0, len(frames) // 2, len(frames) - 1})
            sample = Sample(item, frames[picks], None if maps is None else maps[picks])
            self._kept[place : place + 1] = [(row, sample)]

    def in_order(self) -> list[Sample]:
        """Those that are kept, as their rows follow one another."""
        return [sample for _, sample in sorted(self._kept, key=lambda kept: kept[0])]
