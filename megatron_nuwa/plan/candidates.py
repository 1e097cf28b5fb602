"""Layouts of a number of processes, judged and ranked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_nuwa.errors import UserError
from megatron_nuwa.parallel.cut import cut
from megatron_nuwa.parallel.layout import Layout, ParallelSettings, check_layout
from megatron_nuwa.parallel.units import Recomputation
from megatron_nuwa.plan.communication import Links, Traffic, communication
from megatron_nuwa.plan.devices import Device
from megatron_nuwa.plan.memory import Memory, Step, fullest_stage
from megatron_nuwa.plan.timing import Timing, timing, unit_costs
from megatron_nuwa.plan.workload import (
    MicroBatch,
    micro_batches,
    task_grid,
)
from megatron_nuwa.training.compiling import check_compilable
from megatron_nuwa.training.inputs import check_batches
from megatron_nuwa.training.recipe import Recipe

_RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "selective", "layer")
# Sizes of a micro-batch that are tried, in samples of the longest task.
_SAMPLES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Machine:
    """The processes that are planned for."""

    device: Device
    gpus: int
    gpus_per_node: int


@dataclass(frozen=True)
class Judged:
    """What a layout will need. `micro_batch_tokens` None: one micro-batch a task."""

    layout: Layout
    recomputation: Recomputation
    micro_batch_tokens: int | None
    step: Step
    bounds: tuple[int, ...]
    fullest_stage: int
    memory: Memory
    traffic: tuple[Traffic, ...]
    timing: Timing
    shortfall: int

    @property
    def fits(self) -> bool:
        """Whether the fullest process's memory is enough."""
        return self.shortfall <= 0

    @property
    def name(self) -> str:
        """Layout, recomputation and micro-batch in one line."""
        return f"{self.layout.name} recompute={self.recomputation}"


def judge(
    recipe: Recipe,
    layout: Layout,
    deepspeed: Mapping[str, Any],
    machine: Machine,
    recomputation: Recomputation,
    micro_batch_tokens: int | None,
) -> Judged:
    """One layout's memory, traffic and time; `UserError` where the batch does not divide."""
    assert recipe.model is not None
    batches = micro_batches(recipe, layout.data, micro_batch_tokens)
    return _judge(
        Step(recipe.model, layout, deepspeed, batches, recomputation), machine, micro_batch_tokens
    )


def judge_batches(
    recipe: Recipe,
    layout: Layout,
    deepspeed: Mapping[str, Any],
    machine: Machine,
    batches: list[MicroBatch],
) -> Judged:
    """The same for given micro-batches instead of the recipe's."""
    assert recipe.model is not None
    recomputation = recipe.training.checkpoint_activations
    return _judge(Step(recipe.model, layout, deepspeed, batches, recomputation), machine, None)


def _judge(step: Step, machine: Machine, micro_batch_tokens: int | None) -> Judged:
    layout = step.layout
    # A cut by measured times is not known beforehand; counted FLOPs stand for it.
    by = "flops" if layout.cut == "measured" else layout.cut
    bounds = tuple(cut(unit_costs(step, by), layout.pipeline))
    links = Links(layout, machine.device, machine.gpus_per_node)
    traffic = tuple(communication(step, bounds, links))
    stage, memory = fullest_stage(step, bounds, machine.device)
    return Judged(
        layout,
        step.recomputation,
        micro_batch_tokens,
        step,
        bounds,
        stage,
        memory,
        traffic,
        timing(step, bounds, links, traffic),
        memory.total - machine.device.memory,
    )


def judge_chosen(
    recipe: Recipe, settings: ParallelSettings, deepspeed: Mapping[str, Any], machine: Machine
) -> Judged:
    """The layout that the recipe and its layout file ask for; `UserError` for one that cannot."""
    assert recipe.data is not None
    layout = _checked(recipe, settings, deepspeed, machine)
    check_batches(recipe.data, layout.data)
    return judge(
        recipe,
        layout,
        deepspeed,
        machine,
        recipe.training.checkpoint_activations,
        recipe.data.micro_batch_tokens,
    )


def all_candidates(
    recipe: Recipe, settings: ParallelSettings, deepspeed: Mapping[str, Any], machine: Machine
) -> list[Judged]:
    """Every layout of that many processes that can work, each with its best micro-batch.

    Those that fit come first, the fastest of them first; the others follow, the nearest to
    fitting first. Precision, offloading and sequence parallelism are the chosen layout's.
    """
    found = []
    sizes = [size for size in range(1, machine.gpus + 1) if machine.gpus % size == 0]
    for pipeline in sizes:
        for tensor in sizes:
            for stage in (1, 2, 3):
                candidate = settings.model_copy(
                    update={
                        "pipeline": pipeline,
                        "tensor": tensor,
                        "sequence_parallel": settings.sequence_parallel and tensor > 1,
                    }
                )
                found += _of_one_layout(recipe, candidate, _with_stage(deepspeed, stage), machine)
    return sorted(found, key=_rank)


def _of_one_layout(
    recipe: Recipe, settings: ParallelSettings, deepspeed: Mapping[str, Any], machine: Machine
) -> list[Judged]:
    try:
        layout = _checked(recipe, settings, deepspeed, machine)
    except UserError:
        return []
    found = []
    for recomputation in _RECOMPUTATIONS:
        judged = []
        for tokens in _micro_batch_sizes(recipe, layout.data):
            try:
                judged.append(judge(recipe, layout, deepspeed, machine, recomputation, tokens))
            except UserError:
                continue
        if judged:
            found.append(min(judged, key=_rank))
    return found


def _checked(
    recipe: Recipe, settings: ParallelSettings, deepspeed: Mapping[str, Any], machine: Machine
) -> Layout:
    assert recipe.model is not None
    layout = check_layout(settings, deepspeed, recipe.model, machine.gpus)
    check_compilable(recipe.training, layout)
    return layout


def _micro_batch_sizes(recipe: Recipe, replicas: int) -> list[int | None]:
    """The recipe's own, and whole samples of the longest task as long as a replica has them."""
    assert recipe.model is not None
    assert recipe.data is not None
    own = recipe.data.micro_batch_tokens
    longest = max(task_grid(recipe.model, task).cells for task in recipe.data.tasks)
    most = max(settings.batch_size for settings in recipe.data.tasks.values()) // replicas
    tried = [longest * samples for samples in _SAMPLES if samples <= most]
    return [own, *(tokens for tokens in tried if tokens != own)]


def _with_stage(deepspeed: Mapping[str, Any], stage: int) -> dict[str, Any]:
    zero = deepspeed.get("zero_optimization") or {}
    return {**deepspeed, "zero_optimization": {**zero, "stage": stage}}


def _rank(judged: Judged) -> tuple[bool, float]:
    return not judged.fits, judged.timing.step if judged.fits else judged.shortfall
