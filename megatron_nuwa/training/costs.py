"""What each unit of the model costs in a run, to cut a pipeline by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_nuwa.data.batches import TaskName, context_of
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.flops import unit_flops, unit_names
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig
from megatron_nuwa.parallel.units import Flow, Units
from megatron_nuwa.training.recipe import Recipe

_REPEATS = 3
_TRAINING_PASSES = 3


def unit_costs(
    recipe: Recipe, grids: Mapping[TaskName, Grid], by: str, device: torch.device
) -> list[float]:
    """Costs of `unit_names`, over one step's samples of every task; no sketches are dropped.

    `by` is "flops" (counted, forward and backward), "measured" (seconds on the first process,
    which every process then gets) or "uniform" (1 a layer).
    """
    assert recipe.model is not None
    assert recipe.data is not None
    names = unit_names(recipe.model)
    if by == "uniform":
        return [1.0 if "." in name else 0.0 for name in names]
    totals = [0.0] * len(names)
    for task, grid in grids.items():
        samples = recipe.data.tasks[task].batch_size
        costs = (
            _measured(recipe.model, task, grid, device)
            if by == "measured"
            else _counted(recipe.model, task, grid)
        )
        totals = [total + samples * cost for total, cost in zip(totals, costs, strict=True)]
    return totals


def _counted(config: NuwaConfig, task: TaskName, grid: Grid) -> list[float]:
    counted = unit_flops(config, *context_of(task, grid), grid)
    return [_TRAINING_PASSES * flops for flops in counted]


def _measured(config: NuwaConfig, task: TaskName, grid: Grid, device: torch.device) -> list[float]:
    """Seconds of forward and backward of one sample: one layer of each kind stands for all."""
    times: dict[str, list[float]] = {}
    if dist.get_rank() == 0:
        small = config.model_copy(update={"encoder_layers": 1, "decoder_layers": 1})
        units = Units(Nuwa(small).to(device))
        for _ in range(_REPEATS + 1):
            for name, seconds in _times(units, task, grid, device).items():
                times.setdefault(name, []).append(seconds)
    # The first repeat builds tables and warms caches.
    shared = [{name: statistics.median(seconds[1:]) for name, seconds in times.items()}]
    dist.broadcast_object_list(shared)
    return [shared[0][name.partition(".")[0]] for name in unit_names(config)]


def _times(units: Units, task: TaskName, grid: Grid, device: torch.device) -> dict[str, float]:
    config = units.model.config
    kind, read = context_of(task, grid)
    known = config.text_vocabulary if kind == "text" else config.sketch_codebook_size
    assert known is not None
    seen = torch.randint(0, known, (1, read.cells), device=device)
    target = torch.randint(0, config.codebook_size, (1, grid.cells), device=device)
    flow = Flow.of(Context(kind, seen, read), target, grid)
    times = {}
    for unit, name in enumerate(units.names):
        context = None if flow.context is None else _leaf(flow.context)
        flow = replace(flow, context=context, x=_leaf(flow.x))
        start = _now(device)
        after = units.run(flow, unit, unit + 1)
        changed = [
            new
            for old, new in ((flow.context, after.context), (flow.x, after.x))
            if new is not None and new is not old
        ]
        torch.autograd.backward(changed, [torch.ones_like(tensor) for tensor in changed])
        times[name.partition(".")[0]] = _now(device) - start
        flow = after
    return times


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
