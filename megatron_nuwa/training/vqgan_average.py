"""The exponential moving average of a VQ-GAN's weights over its training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from megatron_nuwa.models.vqgan import Vqgan


class WeightAverage:
    """An averaged copy of a VQ-GAN, `model`, that follows the trained one.

    `average ← d·average + (1 − d)·weights` with `d = min(decay, (1 + n) / (10 + n))` at update n,
    so that the first weights are soon forgotten.
    """

    def __init__(self, trained: Vqgan, decay: float) -> None:
        self.model = copy.deepcopy(trained).requires_grad_(False).eval()
        self.updates = 0
        self._decay = decay
        self._averaged: list[Tensor] = list(self.model.parameters())
        self._trained: list[Tensor] = list(trained.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the trained weights as they are now."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averaged, self._trained, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def begin(self) -> None:
        """Take over the trained weights and forget all others."""
        torch._foreach_copy_(self._averaged, self._trained)
        self.updates = 0
