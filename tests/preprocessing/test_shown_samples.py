"""The samples of the farm's page stand for all of its items."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from preprocessing.shown_samples import SAMPLES, Samples
from preprocessing.sources import SourceItem


def offered(rows: list[int], most: int = SAMPLES) -> Samples:
    samples = Samples(most)
    for row in rows:
        frames = (
            np.full((5, 2, 2, 3), row % 256, np.uint8)
            + np.arange(5, dtype=np.uint8)[:, None, None, None]
        )
        item = SourceItem(id=str(row), media=Path("a.mp4"), captions=("a",))
        samples.offer(row, item, frames, frames[..., 0] if row % 2 else None)
    return samples


def test_few_items_are_all_shown_in_order() -> None:
    shown = offered([4, 0, 7]).in_order()
    assert [sample.item.id for sample in shown] == ["0", "4", "7"]
    for sample in shown:
        row = int(sample.item.id)
        assert sample.frames[:, 0, 0, 0].tolist() == [row, row + 2, row + 4]
        maps = sample.maps
        assert (None if maps is None else maps[:, 0, 0].tolist()) == (
            [row, row + 2, row + 4] if row % 2 else None
        )


def test_items_of_a_long_run_are_from_everywhere() -> None:
    shown = offered(list(range(3000)), 300).in_order()
    assert len(shown) == 300
    ids = [int(sample.item.id) for sample in shown]
    assert ids == sorted(set(ids))
    tenths = Counter(number // 300 for number in ids)
    # 30 each are expected, with a deviation of 5.
    assert len(tenths) == 10
    assert all(12 <= count <= 48 for count in tenths.values())


def test_what_is_kept_does_not_hold_the_whole_clip() -> None:
    shown = offered([1]).in_order()
    assert shown[0].frames.base is None
