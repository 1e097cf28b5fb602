"""The micro-batches of a measured step, and what `plan` says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_nuwa.data.batches import TEXT_GRID, TaskName, TokenBatch
from megatron_nuwa.data.text import text_mask
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, NuwaConfig
from megatron_nuwa.parallel.layout import check_layout, read_layout
from megatron_nuwa.plan.candidates import Judged, Machine, judge_batches
from megatron_nuwa.plan.devices import DEVICES, Device, device_named
from megatron_nuwa.plan.workload import MicroBatch
from megatron_nuwa.training.recipe import Recipe

_WORDS = 12
# Clips a micro-batch beyond which nobody asks.
_MOST = 256


@dataclass(frozen=True)
class Mix:
    """The micro-batches of a step: `count` of so many clips, and one of so many images."""

    clips: int
    images: int
    count: int

    def sizes(self, model: NuwaConfig) -> list[MicroBatch]:
        """Clips first; video prediction and text-to-video take turns."""
        h, w, frames = model.position_grid
        tasks: tuple[TaskName, ...] = ("v2v", "t2v")
        sizes = [
            MicroBatch(tasks[number % 2], self.clips, Grid(h, w, frames))
            for number in range(self.count)
        ]
        return sizes + ([MicroBatch("t2i", self.images, Grid(h, w, 1))] if self.images else [])

    def scaled(self, clips: int) -> Mix:
        """The same with so many clips a micro-batch, and images in proportion."""
        images = max(self.images * clips // self.clips, min(self.images, 1))
        return replace(self, clips=clips, images=images)


class StepPlan:
    """What `plan` says of micro-batches in one process."""

    def __init__(self, recipe: Recipe, layout: Path, device: Device) -> None:
        assert recipe.model is not None
        self.model, self._recipe = recipe.model, recipe
        settings, self.deepspeed = read_layout(layout)
        self.layout = check_layout(settings, self.deepspeed, recipe.model, 1)
        self._machine = Machine(device, 1, 1)

    @property
    def peak(self) -> float:
        """FLOP/s of the device's matrix products in the layout's precision."""
        return self._machine.device.peak(self.layout.precision)

    def judge(self, mix: Mix) -> Judged:
        """Memory and time of a step."""
        sizes = mix.sizes(self.model)
        return judge_batches(self._recipe, self.layout, self.deepspeed, self._machine, sizes)

    def most_clips(self, mix: Mix, memory: int) -> int:
        """The most clips a micro-batch, and images in proportion, that it thinks fit in `memory`
        bytes; at least 1."""
        clips = 1
        while clips < _MOST and self.judge(mix.scaled(clips + 1)).memory.total <= memory:
            clips += 1
        return clips


def planned_device(name: str | None, device: torch.device) -> Device:
    """The device of plan's table that was named, or the one that this looks like."""
    if name is not None:
        return device_named(name)
    if device.type != "cuda":
        return device_named("cpu")
    there = torch.cuda.get_device_properties(device)
    alike = [d for d in DEVICES.values() if d.name.split("-")[0].upper() in there.name.upper()]
    if not alike:
        raise UserError(f"plan knows no {there.name}: name the nearest with --device")
    return min(alike, key=lambda d: abs(d.memory - there.total_memory))


def token_batches(model: NuwaConfig, sizes: Sequence[MicroBatch]) -> list[TokenBatch]:
    """Random tokens: what is learned does not matter here."""
    generator = torch.Generator().manual_seed(0)
    totals = Counter[TaskName]()
    for size in sizes:
        totals[size.task] += size.samples

    def batch(size: MicroBatch) -> TokenBatch:
        words = torch.zeros(size.samples, TEXT_GRID.cells, dtype=torch.int64)
        words[:, :_WORDS] = torch.randint(
            1, model.text_vocabulary, (size.samples, _WORDS), generator=generator
        )
        shape = (size.samples, size.grid.cells)
        target = torch.randint(0, model.codebook_size, shape, generator=generator)
        mask = torch.from_numpy(text_mask(words.numpy()))
        share = size.samples / totals[size.task]
        context = Context("text", words, TEXT_GRID, mask)
        return TokenBatch(size.task, context, target, size.grid, share)

    return [batch(size) for size in sizes]
