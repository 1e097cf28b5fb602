"""The work of one optimizer step: which micro-batches a data-parallel replica runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_nuwa.data.batches import IMAGE_TASKS, TaskName, context_of
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.flops import unit_flops
from megatron_nuwa.models.nuwa import ContextKind, NuwaConfig
from megatron_nuwa.training.recipe import Recipe


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one task that go through the model together.

    In the tasks for sketches the encoder reads those; the steps in which data.caption_dropout has
    it read a text instead cost less.
    """

    task: TaskName
    samples: int
    grid: Grid

    @property
    def tokens(self) -> int:
        """Target tokens."""
        return self.samples * self.grid.cells

    @property
    def context(self) -> tuple[ContextKind, Grid]:
        """Kind and grid of what the encoder reads."""
        return context_of(self.task, self.grid)

    @property
    def context_tokens(self) -> int:
        """Tokens that the encoder reads."""
        return self.samples * self.context[1].cells


def task_grid(config: NuwaConfig, task: TaskName) -> Grid:
    """The largest target of a task: one frame of the model's positions, or all of them.

    Corpora may hold smaller grids; a plan needs none of them at hand and takes the largest.
    """
    h, w, frames = config.position_grid
    return Grid(h, w, 1 if task in IMAGE_TASKS else frames)


def sample_flops(config: NuwaConfig, batch: MicroBatch) -> list[int]:
    """Forward FLOPs of one sample of a micro-batch, a unit each."""
    return unit_flops(config, *batch.context, batch.grid)


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
