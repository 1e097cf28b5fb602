"""The figures of a run's steps: losses, speed, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megatron_nuwa.data.batches import TEXT_GRID, TaskBatches, TaskName, context_of
from megatron_nuwa.models.flops import training_flops
from megatron_nuwa.training.engine import Loss
from megatron_nuwa.training.hardware import allocated_gib, peak_flops
from megatron_nuwa.training.own_time import OwnTime, Stragglers
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.recipe import Recipe


class StepFigures:
    """Collects what happens between two log lines, and averages it over steps and processes.

    The wait for data and the memory are those of the process that has most of it. `stage` is this
    process's pipeline stage. Making one is collective.
    """

    def __init__(
        self,
        recipe: Recipe,
        tasks: Mapping[TaskName, TaskBatches],
        processes: Processes,
        stage: int = 0,
    ) -> None:
        assert recipe.model is not None
        assert recipe.data is not None
        self._processes = processes
        self._weights = {task: s.weight for task, s in recipe.data.tasks.items()}
        self._tokens_a_step = sum(t.order.batch_size * t.grid.cells for t in tasks.values())
        self._tasks = list(tasks.values())
        self._model = recipe.model
        self._peak = peak_flops(processes.device) * processes.world_size
        self._stragglers = Stragglers(processes, stage)
        self._slow: list[str] = []
        self._own_time: OwnTime | None = None
        self._clear()
        self.restart_clock()

    def watch(self, module: nn.Module) -> None:
        """Time the forward passes of what this process trains, to tell who keeps others waiting."""
        self._own_time = OwnTime(module, self._processes.device)

    def add_wait(self, seconds: float) -> None:
        """Time spent waiting for a batch."""
        self._waited += seconds

    def mean_losses(self, losses: Sequence[Loss]) -> dict[TaskName, float]:
        """Each task's mean loss over all processes; every process must call it.

        `losses` may be empty on a process that computes none. Tasks without any are left out.
        """
        names = list(self._weights)
        totals = torch.zeros(len(names), 2, dtype=torch.float64, device=self._processes.device)
        for task, loss, share in losses:
            # No reading back: the device goes on while the next losses are added.
            totals[names.index(task), 0] += loss.double() * share
            totals[names.index(task), 1] += share
        dist.all_reduce(totals)
        return {
            name: total / count
            for name, (total, count) in zip(names, totals.tolist(), strict=True)
            if count
        }

    def add(self, losses: Mapping[TaskName, float]) -> None:
        """The tasks' mean losses of one step that was taken; also stops the step's clock."""
        for task, loss in losses.items():
            self._losses[task] = self._losses.get(task, 0.0) + loss
        self._taken += 1
        self._stop_clock()

    def add_skipped(self) -> None:
        """One step that was skipped; also stops the step's clock."""
        self._skipped += 1
        self._stop_clock()

    def restart_clock(self) -> None:
        """Begin timing the next step; saving and evaluating are not a step's time."""
        self._clock = time.perf_counter()

    def take(
        self, step: int, grad_norm: float, rate: float, loss_scale: float | None = None
    ) -> dict[str, float]:
        """All tags since the last call; every process must call it.

        Losses are left out where every step was skipped, the gradient norm where it is not finite
        because the last one was, and the loss scale where it is None.
        """
        steps = self._taken + self._skipped
        seconds = self._seconds / steps
        ratios = self._stragglers.compare(
            self._own_time.take() if self._own_time else self._seconds
        )
        self._slow = self._stragglers.names(ratios, steps)
        waited, gib = self._largest(self._waited, allocated_gib(self._processes.device))
        values = self._loss_values()
        if math.isfinite(grad_norm):
            values["train/grad_norm"] = grad_norm
        if loss_scale is not None:
            values["train/loss_scale"] = loss_scale
        values |= {
            "train/lr": rate,
            "speed/tokens_per_second": self._tokens_a_step / seconds,
            "speed/step_seconds": seconds,
            "speed/step_seconds_spread": max(ratios),
            "speed/skipped_steps": float(self._skipped),
            "speed/mfu": self._flops(range(step - steps, step)) / self._peak / self._seconds,
            "speed/data_wait_fraction": waited / self._seconds,
            "memory/allocated_gib": gib,
        }
        self._clear()
        return values

    def stragglers(self) -> list[str]:
        """Who computed much longer than its peers, one phrase each, as of the last `take`.

        Such as "rank 3 on host n2: 1.8× the median over 40 steps".
        """
        return self._slow

    def line(self, step: int, last: int, values: Mapping[str, float]) -> str:
        """One console line that a person can read."""
        left = (last - step) * values["speed/step_seconds"]
        loss = norm = skipped = ""
        if "train/loss" in values:
            of_tasks = [f"{task} {values[f'train/loss/{task}']:.3f}" for task in self._weights]
            loss = f"loss {values['train/loss']:.4f} ({' '.join(of_tasks)})  "
        if "train/grad_norm" in values:
            norm = f"norm {values['train/grad_norm']:.2f}  "
        if values["speed/skipped_steps"]:
            skipped = f"  skipped {values['speed/skipped_steps']:.0f}"
        return (
            f"step {step}/{last}  {loss}lr {values['train/lr']:.2e}  {norm}"
            f"{values['speed/tokens_per_second']:,.0f} tokens/s  "
            f"mfu {values['speed/mfu']:.1%}  left {_duration(left)}{skipped}"
        )

    def _flops(self, steps: range) -> int:
        """FLOPs of all processes in the steps, 0-based; some read texts in place of sketches."""
        total = 0
        for task in self._tasks:
            with_sketches = sum(task.reads_sketches(step) for step in steps)
            text = training_flops(self._model, "text", TEXT_GRID, task.grid)
            total += task.order.batch_size * text * (len(steps) - with_sketches)
            if with_sketches:
                sketch = training_flops(self._model, *context_of(task.task, task.grid), task.grid)
                total += task.order.batch_size * sketch * with_sketches
        return total

    def _largest(self, *values: float) -> list[float]:
        """The largest of each value over all processes; every process must call it."""
        largest = torch.tensor(values, dtype=torch.float64, device=self._processes.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def _loss_values(self) -> dict[str, float]:
        if not self._taken:
            return {}
        means = {task: total / self._taken for task, total in self._losses.items()}
        values = {"train/loss": sum(self._weights[task] * loss for task, loss in means.items())}
        values |= {f"train/loss/{task}": loss for task, loss in means.items()}
        values |= {f"train/perplexity/{task}": math.exp(min(v, 80)) for task, v in means.items()}
        return values

    def _stop_clock(self) -> None:
        self._seconds += time.perf_counter() - self._clock

    def _clear(self) -> None:
        self._losses: dict[TaskName, float] = {}
        self._taken = 0
        self._skipped = 0
        self._seconds = 0.0
        self._waited = 0.0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
