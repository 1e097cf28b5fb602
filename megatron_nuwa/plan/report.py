"""A plan as tables for a person and as JSON for a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_nuwa.models.flops import unit_names
from megatron_nuwa.parallel.cut import stage_table
from megatron_nuwa.plan.candidates import Judged, Machine
from megatron_nuwa.plan.devices import GIB
from megatron_nuwa.plan.parameters import parameter_counts
from megatron_nuwa.plan.timing import days, step_flops, unit_costs
from megatron_nuwa.plan.workload import MicroBatch, sample_flops, task_grid
from megatron_nuwa.training.recipe import Recipe

_HOURS = 24
_SUMS = (
    "zero1 with data_types.grad_accum_dtype fp32 sums gradients over replicas in fp32; "
    "zero2 and zero3 do so in half precision, which is part of their speed"
)
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "working", "framework")
_KINDS = {
    "data_parallel": "gradients over data parallel",
    "zero_gather": "ZeRO's gathering of weights",
    "tensor_parallel": "tensor-parallel sums",
    "pipeline": "pipeline sends",
}


def as_json(
    recipe: Recipe, machine: Machine, chosen: Judged, candidates: Sequence[Judged]
) -> dict[str, Any]:
    """Bytes, FLOPs and seconds, nothing rounded.

    Keys: recipe, device, gpus, gpus_per_node, device_memory, schedule_steps, warmup_steps,
    parameters, tasks, tokens_per_step, chosen, and candidates, ranked; a layout's entry is that of
    `judged_as_json`.
    """
    return {
        "recipe": recipe.name,
        "device": machine.device.name,
        "gpus": machine.gpus,
        "gpus_per_node": machine.gpus_per_node,
        "device_memory": machine.device.memory,
        "schedule_steps": recipe.schedule.steps,
        "warmup_steps": recipe.schedule.warmup_steps,
        "parameters": _parameters(recipe),
        "tasks": task_figures(recipe),
        "tokens_per_step": sum(task["tokens"] for task in task_figures(recipe).values()),
        "chosen": judged_as_json(chosen, recipe, machine),
        "candidates": [judged_as_json(judged, recipe, machine) for judged in candidates],
    }


def judged_as_json(judged: Judged, recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """One layout: name, sizes, memory by part, traffic by kind, time, and whether it fits."""
    forward, backward, recomputed = step_flops(judged.step)
    layout = judged.layout
    length = days(judged.timing, recipe.schedule.steps)
    return {
        "layout": layout.name,
        "pipeline": layout.pipeline,
        "tensor": layout.tensor,
        "data": layout.data,
        "zero_stage": layout.zero_stage,
        "precision": layout.precision,
        "recomputation": judged.recomputation,
        "micro_batch_tokens": judged.micro_batch_tokens,
        "micro_batches": len(judged.step.micro_batches),
        "stage_bounds": list(judged.bounds),
        "fullest_stage": judged.fullest_stage,
        "memory": {**asdict(judged.memory), "total": judged.memory.total},
        "fits": judged.fits,
        "shortfall": max(judged.shortfall, 0),
        "flops": {
            "forward": forward * layout.data,
            "backward": backward * layout.data,
            "recomputation": recomputed * layout.data,
        },
        "communication": {kind.kind: asdict(kind) for kind in judged.traffic},
        "timing": asdict(judged.timing),
        "days": length,
        "gpu_hours": length * _HOURS * machine.gpus,
    }


def task_figures(recipe: Recipe) -> dict[str, dict[str, int]]:
    """FLOPs, target tokens and samples of each task in a step of all processes."""
    assert recipe.data is not None
    assert recipe.model is not None
    again = recipe.training.checkpoint_activations == "layer"
    figures = {}
    for task, settings in recipe.data.tasks.items():
        grid = task_grid(recipe.model, task)
        units = sample_flops(recipe.model, MicroBatch(task, 1, grid))
        layers = sum(units) - units[0] - units[-1]
        figures[str(task)] = {
            "samples": settings.batch_size,
            "tokens": settings.batch_size * grid.cells,
            "forward": settings.batch_size * sum(units),
            "backward": settings.batch_size * 2 * sum(units),
            "recomputation": settings.batch_size * layers if again else 0,
        }
    return figures


def show(
    console: Console,
    recipe: Recipe,
    machine: Machine,
    chosen: Judged,
    candidates: Sequence[Judged],
    rows: int,
) -> None:
    """Everything as tables; `rows` is how many layouts each ranking shows."""
    console.print(_model_table(recipe), _task_table(recipe))
    console.print(_memory_table(chosen, machine), _communication_table(chosen))
    if chosen.layout.pipeline > 1:
        config = chosen.step.config
        console.print(stage_table(unit_names(config), unit_costs(chosen.step), chosen.bounds))
    _show_verdict(console, chosen, recipe, machine)
    fitting = [judged for judged in candidates if judged.fits]
    others = [judged for judged in candidates if not judged.fits]
    title = f"Layouts of {machine.gpus} × {machine.device.name} that fit, the fastest first"
    console.print(_ranking(title, fitting[:rows], recipe, machine))
    _show_rest(console, len(fitting), rows, "fit")
    if chosen.layout.precision != "fp32" and machine.gpus > 1:
        console.print(_SUMS, highlight=False)
    if others:
        console.print(_missing_table(others[:rows]))
        _show_rest(console, len(others), rows, "do not fit")


def _parameters(recipe: Recipe) -> dict[str, int]:
    assert recipe.model is not None
    return parameter_counts(recipe.model)


def _model_table(recipe: Recipe) -> Table:
    table = Table(title=f"Parameters, {recipe.name}")
    table.add_column("part")
    table.add_column("millions", justify="right")
    for name, number in _parameters(recipe).items():
        table.add_row(name.replace("_", " "), f"{number / 1e6:,.1f}")
    return table


def _task_table(recipe: Recipe) -> Table:
    table = Table(title="A step of all processes")
    columns = ("task", "samples", "tokens", "forward", "backward", "recomputed")
    for column in columns:
        table.add_column(column, justify="left" if column == "task" else "right")
    figures = task_figures(recipe)
    total = {
        key: sum(task[key] for task in figures.values()) for key in next(iter(figures.values()))
    }
    for name, task in {**figures, "all": total}.items():
        flops = (f"{task[k] / 1e12:,.1f} TFLOP" for k in ("forward", "backward", "recomputation"))
        table.add_row(name, f"{task['samples']:,}", f"{task['tokens']:,}", *flops)
    return table


def _memory_table(chosen: Judged, machine: Machine) -> Table:
    stage = f", stage {chosen.fullest_stage} (the fullest)" if chosen.layout.pipeline > 1 else ""
    table = Table(title=f"Memory of a process, {chosen.name}{stage}")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    parts = asdict(chosen.memory)
    for part in _PARTS:
        table.add_row(part, _gib(parts[part]))
    table.add_row("total", _gib(chosen.memory.total), style="bold")
    table.add_row("of", _gib(machine.device.memory))
    if chosen.memory.host:
        table.add_row("beside it in the node's memory", _gib(chosen.memory.host))
    return table


def _communication_table(chosen: Judged) -> Table:
    table = Table(title="A process's communication in a step")
    for column in ("kind", "GB", "ms", "hidden by computation"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in chosen.traffic:
        hidden = "" if not kind.bytes else "yes" if kind.overlaps else "no"
        row = (f"{kind.bytes / 1e9:,.2f}", f"{kind.seconds * 1e3:,.1f}", hidden)
        table.add_row(_KINDS[kind.kind], *row)
    return table


def _show_verdict(console: Console, chosen: Judged, recipe: Recipe, machine: Machine) -> None:
    times, steps, warmup = chosen.timing, recipe.schedule.steps, recipe.schedule.warmup_steps
    length = days(times, steps)
    console.print(
        f"{chosen.name}: step {times.step:.3f} s, bubble {times.bubble:.1%}, MFU {times.mfu:.1%}, "
        f"{times.tokens_per_second:,.0f} tokens/s; {steps:,} steps take {length:,.1f} days and "
        f"{length * _HOURS * machine.gpus:,.0f} GPU-hours",
        highlight=False,
    )
    if warmup:
        console.print(
            f"warm-up (schedule.warmup_fraction {recipe.schedule.warmup_fraction:g} of "
            f"schedule.steps) ends after {warmup:,} steps, {days(times, warmup):,.1f} days",
            highlight=False,
        )
    if not chosen.fits:
        console.print(
            f"it does NOT fit: {_gib(chosen.shortfall)} GiB too much", style="bold", highlight=False
        )


def _ranking(title: str, ranked: Sequence[Judged], recipe: Recipe, machine: Machine) -> Table:
    table = Table(title=title)
    columns = ("layout", "recompute", "micro-batch", "GiB", "bubble", "step s", "MFU", "tokens/s")
    for column in (*columns, "days", "GPU-hours"):
        left = column in columns[:2]
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    for judged in ranked:
        times = judged.timing
        length = days(times, recipe.schedule.steps)
        table.add_row(
            judged.layout.name,
            judged.recomputation,
            _micro_batch(judged),
            _gib(judged.memory.total),
            f"{times.bubble:.1%}",
            f"{times.step:.3f}",
            f"{times.mfu:.1%}",
            f"{times.tokens_per_second:,.0f}",
            f"{length:,.1f}",
            f"{length * _HOURS * machine.gpus:,.0f}",
        )
    return table


def _missing_table(others: Sequence[Judged]) -> Table:
    table = Table(title="Layouts that do not fit")
    for column in ("layout", "recompute", "micro-batch", "GiB", "too much, GiB"):
        left = column in ("layout", "recompute")
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    for judged in others:
        sizes = (_gib(judged.memory.total), _gib(judged.shortfall))
        table.add_row(judged.layout.name, judged.recomputation, _micro_batch(judged), *sizes)
    return table


def _show_rest(console: Console, number: int, rows: int, what: str) -> None:
    if number > rows:
        console.print(f"and {number - rows} more that {what} (--rows, --json)", highlight=False)


def _micro_batch(judged: Judged) -> str:
    tokens = judged.micro_batch_tokens
    return "a task" if tokens is None else f"{tokens:,} tokens"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
