"""The work of one optimizer step: which micro-batches a data-parallel replica runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_nuwa.data.batches import TEXT_GRID, TaskName
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.models.flops import unit_flops
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.training.recipe import Recipe


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one task that go through the model together."""

    task: TaskName
    samples: int
    grid: Grid

    @property
    def tokens(self) -> int:
        """Target tokens."""
        return self.samples * self.grid.cells


def task_grid(config: NuwaConfig, task: TaskName) -> Grid:
    """The largest target of a task: one frame of the model's positions, or all of them.

    Corpora may hold smaller grids; a plan needs none of them at hand and takes the largest.
    """
    h, w, frames = config.position_grid
    return Grid(h, w, 1 if task == "t2i" else frames)


def sample_flops(config: NuwaConfig, grid: Grid) -> list[int]:
    """Forward FLOPs of one sample with a text as its context, a unit each."""
    extent = Extent.from_reading(config.text_extent, config.extent_reading)
    return unit_flops(config, TEXT_GRID, extent, grid)


def micro_batches(recipe: Recipe, replicas: int, tokens: int | None) -> list[MicroBatch]:
    """What one of `replicas` runs in a step, no micro-batch with more than `tokens` target tokens.

    Without `tokens` a task's share is one micro-batch, or `data.accumulation` of them. A single
    sample is run whole however long it is. `UserError` for a batch that does not divide.
    """
    assert recipe.data is not None
    assert recipe.model is not None
    found = []
    for task, settings in recipe.data.tasks.items():
        parts = replicas * (recipe.data.accumulation if tokens is None else 1)
        if settings.batch_size % parts:
            raise UserError(
                f"data.tasks.{task}.batch_size {settings.batch_size} does not divide by {parts} "
                "(data-parallel replicas × accumulation)"
            )
        share = settings.batch_size // replicas
        grid = task_grid(recipe.model, task)
        count = recipe.data.accumulation
        if tokens is not None:
            count = math.ceil(share / max(tokens // grid.cells, 1))
        small, larger = divmod(share, count)
        found += [MicroBatch(task, small + (part < larger), grid) for part in range(count)]
    return found
