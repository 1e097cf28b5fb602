"""Figures of a VQ-GAN training between two log lines."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nuwa.training.codebook_upkeep import perplexity
from megatron_nuwa.training.processes import Processes


class FigureWindow:
    """Figures between two log lines, over all processes."""

    def __init__(self, codebook_size: int, processes: Processes) -> None:
        self._codebook_size = codebook_size
        self._processes = processes
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._times: dict[str, int] = {}
        self._counts = torch.zeros(self._codebook_size, device=self._processes.device)
        self._broken = 0
        self._steps = 0
        self._start = time.monotonic()

    def add(self, figures: dict[str, Tensor], counts: Tensor, broken: int) -> None:
        """Take in one step: its figures, the codes' counts, the broken items passed over."""
        for tag, value in figures.items():
            self._sums[tag] = self._sums.get(tag, torch.zeros(())) + value.float().cpu()
            self._times[tag] = self._times.get(tag, 0) + 1
        self._counts += counts
        self._broken += broken
        self._steps += 1

    def close(self, batch_size: int) -> dict[str, float]:
        """Means since the last call; called by all processes together."""
        tags = sorted(self._sums)
        means = torch.stack([self._sums[tag] / self._times[tag] for tag in tags])
        means = means.to(self._processes.device)
        broken = torch.tensor(float(self._broken), device=self._processes.device)
        dist.all_reduce(means)
        dist.all_reduce(broken)
        figures = dict(zip(tags, (means / self._processes.world_size).tolist(), strict=True))
        figures["codebook/perplexity"] = perplexity(self._counts)
        figures["codebook/used_fraction"] = float((self._counts > 0).double().mean())
        seconds = time.monotonic() - self._start
        figures["speed/images_per_second"] = self._steps * batch_size / seconds
        figures["data/broken_items"] = float(broken)
        self._clear()
        return figures
