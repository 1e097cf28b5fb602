"""Segmentation maps as VQ-GAN-Seg reads and writes them, and how well they are reconstructed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def one_hot(maps: Tensor, classes: int) -> Tensor:
    """Maps of class numbers (batch, H, W), integers, as float (batch, classes, H, W).

    Raises `ValueError` for another shape or type, and for a class outside 0 … classes − 1.
    """
    if maps.ndim != 3 or maps.is_floating_point() or maps.is_complex():
        raise ValueError(
            f"maps must be integers of shape (batch, H, W), not {maps.dtype} of shape "
            f"{tuple(maps.shape)}"
        )
    if maps.numel() and not 0 <= int(maps.min()) <= int(maps.max()) < classes:
        raise ValueError(
            f"maps must hold classes 0 … {classes - 1}, not {int(maps.min())} … {int(maps.max())}"
        )
    # Written in place of `F.one_hot`, whose int64 would take twice the memory of the result.
    empty = torch.zeros(maps.shape[0], classes, *maps.shape[1:], device=maps.device)
    return empty.scatter_(1, maps.long().unsqueeze(1), 1.0)


def palette(classes: int) -> np.ndarray:
    """A colour a class, uint8 (classes, 3): black for class 0, then those of PASCAL VOC.

    Bits 0, 3, 6 of a class number are the highest bits of red, bits 1, 4, 7 of green, and so on.
    """
    colours = np.zeros((classes, 3), np.uint8)
    for channel in range(3):
        for place in range(3):
            bits = (np.arange(classes) >> (3 * place + channel)) & 1
            colours[:, channel] |= (bits << (7 - place)).astype(np.uint8)
    return colours


def class_map(logits: Tensor) -> Tensor:
    """The likeliest class of each pixel, int64 (batch, H, W), of logits (batch, classes, H, W)."""
    return logits.argmax(dim=1)


def confusion_matrix(found: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """How many pixels of class i (row) were taken for class j (column): int64 (classes, classes).

    `found` and `wanted` are maps of class numbers of one shape. Matrices of several batches add up;
    raises `ValueError` when the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"maps of shapes {tuple(found.shape)} and {tuple(wanted.shape)} differ")
    pairs = wanted.long().flatten() * classes + found.long().flatten()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of pixels whose class is right, of a confusion matrix; nan without pixels."""
    return float(confusion.diagonal().sum() / confusion.sum())


def frequency_weighted_iou(confusion: Tensor) -> float:
    """Intersection over union of each class, weighed by its share of the pixels; nan without any.

    `Σ_c n_c/n · n_cc / (n_c + m_c − n_cc)`, with `n_c` pixels of class c and `m_c` taken for it.
    """
    counts = confusion.double()
    wanted, taken, right = counts.sum(1), counts.sum(0), counts.diagonal()
    there = wanted > 0
    iou = right[there] / (wanted + taken - right)[there]
    return float((wanted[there] / counts.sum() * iou).sum())
