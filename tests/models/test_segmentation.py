"""Segmentation maps as one-hot channels and back, and the figures of their reconstruction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_nuwa.models.segmentation import (
    class_map,
    confusion_matrix,
    frequency_weighted_iou,
    one_hot,
    pixel_accuracy,
)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_one_hot_maps_come_back_as_the_same_classes(dtype: torch.dtype) -> None:
    maps = torch.randint(0, 7, (3, 6, 4)).to(dtype)
    channels = one_hot(maps, 7)
    assert channels.shape == (3, 7, 6, 4)
    assert channels.dtype == torch.float32
    assert torch.equal(channels.sum(1), torch.ones(3, 6, 4))
    assert torch.equal(class_map(channels), maps.long())


@pytest.mark.parametrize(
    ("maps", "sentence"),
    [
        (torch.full((1, 2, 2), 3), "maps must hold classes 0 … 2, not 3 … 3"),
        (torch.full((1, 2, 2), -1), "not -1 … -1"),
        (torch.zeros(1, 2, 2), "maps must be integers of shape"),
        (torch.zeros(2, 2, dtype=torch.int64), "maps must be integers of shape"),
    ],
)
def test_maps_that_are_none_are_refused(maps: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        one_hot(maps, 3)


def test_figures_are_those_of_their_definitions_counted_pixel_by_pixel() -> None:
    random = np.random.default_rng(0)
    # Class 4 never occurs, class 3 is never found.
    wanted, found = random.integers(0, 4, (3, 8, 9)), random.integers(0, 3, (3, 8, 9))
    found = np.where(random.random(found.shape) < 0.5, np.minimum(wanted, 2), found)
    parts = [
        confusion_matrix(torch.from_numpy(f), torch.from_numpy(w), 5)
        for f, w in zip(found, wanted, strict=True)
    ]
    confusion = torch.stack(parts).sum(0)
    right = iou = 0.0
    for f, w in zip(found.flatten(), wanted.flatten(), strict=True):
        right += f == w
    for number in range(5):
        both = np.sum((wanted == number) & (found == number))
        either = np.sum((wanted == number) | (found == number))
        if either:
            iou += np.mean(wanted == number) * both / either
    assert pixel_accuracy(confusion) == pytest.approx(right / wanted.size)
    assert frequency_weighted_iou(confusion) == pytest.approx(iou)


def test_a_perfect_map_scores_one_and_no_pixels_score_nothing() -> None:
    maps = torch.randint(0, 3, (2, 4, 4))
    perfect = confusion_matrix(maps, maps, 3)
    assert pixel_accuracy(perfect) == frequency_weighted_iou(perfect) == 1
    assert math.isnan(pixel_accuracy(torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="differ"):
        confusion_matrix(maps, maps[:1], 3)
