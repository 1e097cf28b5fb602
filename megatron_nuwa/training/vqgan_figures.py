"""Figures of a VQ-GAN training between two log lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nuwa.training.codebook_upkeep import perplexity
from megatron_nuwa.training.processes import Processes

# What a step says of itself alone, and of all steps so far; other figures are averaged over steps.
_COUNTS = ("codebook/restarted",)
_RUNNING_COUNTS = ("train/skipped_steps",)


class FigureWindow:
    """Figures between two log lines, over all processes."""

    def __init__(self, codebook_size: int, processes: Processes) -> None:
        self._codebook_size = codebook_size
        self._processes = processes
        self._clear()
        self.restart_clock()

    def _clear(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._counts = torch.zeros(self._codebook_size, device=self._processes.device)
        self._broken = 0
        self._steps = 0
        self._seconds = 0.0

    def restart_clock(self) -> None:
        """Begin timing the next step; saving, evaluating and starting are not a step's time."""
        self._clock = time.monotonic()

    def add(self, figures: dict[str, Tensor], counts: Tensor, broken: int) -> None:
        """Take in one step: its figures, the codes' counts, the broken items passed over.

        Also stops the step's clock.
        """
        for tag, value in figures.items():
            self._values.setdefault(tag, []).append(float(value))
        self._counts += counts
        self._broken += broken
        self._steps += 1
        self._seconds += time.monotonic() - self._clock

    def close(self, batch_size: int) -> dict[str, float]:
        """Means and counts since the last call; called by all processes together."""
        tags = sorted(self._values)
        mine = [_over_steps(tag, self._values[tag]) for tag in tags]
        means = torch.tensor(mine, device=self._processes.device)
        broken = torch.tensor(float(self._broken), device=self._processes.device)
        dist.all_reduce(means)
        dist.all_reduce(broken)
        figures = dict(zip(tags, (means / self._processes.world_size).tolist(), strict=True))
        figures["codebook/perplexity"] = perplexity(self._counts)
        figures["codebook/used_fraction"] = float((self._counts > 0).double().mean())
        figures["speed/images_per_second"] = self._steps * batch_size / self._seconds
        figures["data/broken_items"] = float(broken)
        self._clear()
        return figures


def _over_steps(tag: str, values: Sequence[float]) -> float:
    if tag in _COUNTS:
        return sum(values)
    return values[-1] if tag in _RUNNING_COUNTS else fmean(values)
