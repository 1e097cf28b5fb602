"""What each unit of the model costs in a run, to cut a pipeline by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_nuwa.data.batches import TaskName, context_of
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.flops import unit_flops, unit_names
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig
from megatron_nuwa.parallel.units import Flow, Recomputation, Units
from megatron_nuwa.training.recipe import Recipe

_REPEATS = 3


def unit_costs(
    recipe: Recipe, grids: Mapping[TaskName, Grid], by: str, device: torch.device
) -> list[float]:
    """Costs of `unit_names`, over one step's samples of every task; no sketches are dropped.

    `by` is "measured" (seconds on the first process, which every process then gets), or one of
    those of `counted_costs`.
    """
    assert recipe.model is not None
    assert recipe.data is not None
    recompute = recipe.training.checkpoint_activations
    samples = {task: recipe.data.tasks[task].batch_size for task in grids}
    if by != "measured":
        work = ((task, grid, samples[task]) for task, grid in grids.items())
        return counted_costs(recipe.model, work, by, recompute)
    totals = [0.0] * len(unit_names(recipe.model))
    for task, grid in grids.items():
        costs = _measured(recipe.model, task, grid, recompute, device)
        totals = [total + samples[task] * cost for total, cost in zip(totals, costs, strict=True)]
    return totals


def counted_costs(
    config: NuwaConfig,
    work: Iterable[tuple[TaskName, Grid, int]],
    by: str,
    recompute: Recomputation,
) -> list[float]:
    """Costs of `unit_names` over the samples of `work`, a number for each task and target grid.

    `by` is "flops" (forward, backward and repeated passes) or "uniform" (1 a layer).
    """
    names = unit_names(config)
    if by == "uniform":
        return [float(is_layer(name)) for name in names]
    totals = [0.0] * len(names)
    for task, grid, samples in work:
        for unit, flops in enumerate(unit_flops(config, *context_of(task, grid), grid)):
            totals[unit] += samples * flops * passes(names[unit], recompute)
    return totals


def passes(name: str, recompute: Recomputation) -> int:
    """How often a step does the work of a unit's forward pass; backward counts as two."""
    return 4 if recompute == "layer" and is_layer(name) else 3


def is_layer(name: str) -> bool:
    """Whether a unit is a layer of the encoder or the decoder, which can be recomputed."""
    return name.startswith(("encoder.", "decoder."))


def _measured(
    config: NuwaConfig, task: TaskName, grid: Grid, recompute: Recomputation, device: torch.device
) -> list[float]:
    """Seconds of forward and backward of one sample: one layer of each kind stands for all."""
    times: dict[str, list[float]] = {}
    if dist.get_rank() == 0:
        small = config.model_copy(update={"encoder_layers": 1, "decoder_layers": 1})
        units = Units(Nuwa(small).to(device), recompute)
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
