"""The figures of a run's steps: losses, speed, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_nuwa.data.batches import TEXT_GRID, TaskBatches, TaskName
from megatron_nuwa.grid import Extent
from megatron_nuwa.models.flops import training_flops
from megatron_nuwa.training.hardware import allocated_gib, peak_flops
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.recipe import Recipe


class StepFigures:
    """Collects what happens between two log lines, and averages it over steps and processes."""

    def __init__(
        self, recipe: Recipe, tasks: Mapping[TaskName, TaskBatches], processes: Processes
    ) -> None:
        assert recipe.model is not None
        assert recipe.data is not None
        text_extent = Extent.from_reading(recipe.model.text_extent, recipe.model.extent_reading)
        self._processes = processes
        self._weights = {task: s.weight for task, s in recipe.data.tasks.items()}
        self._samples_a_step = sum(task.order.batch_size for task in tasks.values())
        self._tokens_a_step = sum(t.order.batch_size * t.grid.cells for t in tasks.values())
        flops = sum(
            task.order.batch_size * training_flops(recipe.model, TEXT_GRID, text_extent, task.grid)
            for task in tasks.values()
        )
        self._ideal_seconds = flops / (peak_flops(processes.device) * processes.world_size)
        self._clear()
        self.restart_clock()

    def add_wait(self, seconds: float) -> None:
        """Time spent waiting for a batch."""
        self._waited += seconds

    def add(self, losses: Sequence[tuple[TaskName, torch.Tensor, float]]) -> None:
        """Losses of one step's micro-batches; also stops the step's clock."""
        self._losses += losses
        self._steps += 1
        self._seconds += time.perf_counter() - self._clock

    def restart_clock(self) -> None:
        """Begin timing the next step; saving and evaluating are not a step's time."""
        self._clock = time.perf_counter()

    def samples(self, step: int) -> int:
        """Samples seen by all processes after a step."""
        return step * self._samples_a_step

    def take(self, step: int, grad_norm: float, rate: float) -> dict[str, float]:
        """All tags since the last call; every process must call it."""
        means = self._mean_losses()
        seconds = self._seconds / self._steps
        values = {"train/loss": sum(self._weights[task] * loss for task, loss in means.items())}
        values |= {f"train/loss/{task}": loss for task, loss in means.items()}
        values |= {f"train/perplexity/{task}": math.exp(min(v, 80)) for task, v in means.items()}
        values |= {
            "train/grad_norm": grad_norm,
            "train/lr": rate,
            "speed/tokens_per_second": self._tokens_a_step / seconds,
            "speed/step_seconds": seconds,
            "speed/mfu": self._ideal_seconds / seconds,
            "speed/data_wait_fraction": self._waited / self._seconds,
            "memory/allocated_gib": allocated_gib(self._processes.device),
        }
        self._clear()
        return values

    def line(self, step: int, last: int, values: Mapping[str, float]) -> str:
        """One console line that a person can read."""
        left = (last - step) * values["speed/step_seconds"]
        losses = " ".join(f"{task} {values[f'train/loss/{task}']:.3f}" for task in self._weights)
        return (
            f"step {step}/{last}  loss {values['train/loss']:.4f} ({losses})  "
            f"lr {values['train/lr']:.2e}  norm {values['train/grad_norm']:.2f}  "
            f"{values['speed/tokens_per_second']:,.0f} tokens/s  "
            f"mfu {values['speed/mfu']:.1%}  left {_duration(left)}"
        )

    def _mean_losses(self) -> dict[TaskName, float]:
        names = list(self._weights)
        totals = torch.zeros(len(names), 2, dtype=torch.float64)
        for task, loss, _share in self._losses:
            totals[names.index(task)] += torch.tensor([float(loss), 1.0], dtype=torch.float64)
        totals = totals.to(self._processes.device)
        dist.all_reduce(totals)
        return {
            name: float(total / count) for name, (total, count) in zip(names, totals, strict=True)
        }

    def _clear(self) -> None:
        self._losses: list[tuple[TaskName, torch.Tensor, float]] = []
        self._steps = 0
        self._seconds = 0.0
        self._waited = 0.0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
