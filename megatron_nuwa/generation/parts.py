"""Frames through a VQ-GAN, a bounded number of pixels at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# 16 frames of 336 × 336: some 4 GiB in the paper's VQ-GAN.
_PIXELS_AT_ONCE = 16 * 336 * 336


def in_parts(work: Callable[[Tensor], Tensor], frames: Tensor, pixels: int) -> Tensor:
    """What `work` gives for all frames (the first dimension), called with some of them at a time.

    `pixels` is the number of pixels of a frame, also where `frames` holds its tokens.
    """
    most = _PIXELS_AT_ONCE // pixels
    # Even parts, and none of two: convolutions treat a frame alone by other kernels, so that a
    # remainder of one would get other bits than the rest.
    most = most if most > 2 else 1
    parts = frames.tensor_split(-(-len(frames) // most))
    return torch.cat([work(part) for part in parts])
