"""How long a step takes: products at the device's efficiency, the pipeline's bubble, what waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_nuwa.models.flops import unit_names
from megatron_nuwa.plan.communication import Links, Traffic, boundary_bytes
from megatron_nuwa.plan.memory import Step, layer_of
from megatron_nuwa.plan.parameters import unit_parameters
from megatron_nuwa.plan.state import partition
from megatron_nuwa.plan.workload import MicroBatch, sample_flops
from megatron_nuwa.training.costs import counted_costs, is_layer, passes

_DAY = 86_400
# Adam reads gradient, weight and two moments and writes three of them, all fp32.
_UPDATE_BYTES = 28
# A half-precision gradient is read, and added to its fp32 sum.
_ACCUMULATE_BYTES = 10
# What is recomputed element by element is read and written.
_TOUCHES = 2
# Of the communication that DeepSpeed starts beside computation, the share that costs nothing: it
# takes processors and memory from the products. An assumption, to be replaced by a measurement.
_HIDDEN_SHARE = 0.5


@dataclass(frozen=True)
class Timing:
    """Seconds of a step and what they are made of.

    `compute`: an even share of the products of all processes. `bubble`: the share of the
    pipeline's time in which a stage waits; (S − 1)/(M + S − 1) for S equal stages and M equal
    micro-batches. `exposed`: communication that nothing hides. `update`: the optimizer.
    """

    step: float
    compute: float
    bubble: float
    exposed: float
    update: float
    mfu: float
    tokens_per_second: float


def step_flops(step: Step) -> tuple[int, int, int]:
    """FLOPs of a replica's step: forward, backward, and forward passes that are repeated."""
    forward = recomputed = 0
    names = unit_names(step.config)
    for batch in step.micro_batches:
        units = sample_flops(step.config, batch)
        forward += batch.samples * sum(units)
        if step.recomputation == "layer":
            layers = (f for n, f in zip(names, units, strict=True) if is_layer(n))
            recomputed += batch.samples * sum(layers)
    return forward, 2 * forward, recomputed


def unit_costs(step: Step, by: str = "flops") -> list[float]:
    """Costs of the units in a step, as the run counts them."""
    work = ((batch.task, batch.grid, batch.samples) for batch in step.micro_batches)
    return counted_costs(step.config, work, by, step.recomputation)


def timing(step: Step, bounds: Sequence[int], links: Links, traffic: Sequence[Traffic]) -> Timing:
    """The expected step of a layout; what offloading sends to the host is not counted."""
    stages = [_stage_seconds(step, bounds, stage, links) for stage in range(step.layout.pipeline)]
    chain, bubble = pipelined(stages)
    busy = sum(map(sum, stages)) / len(stages)
    # Each side of the pipeline's ramp waits for every boundary once.
    batch = max(step.micro_batches, key=lambda b: b.tokens)
    hop = boundary_bytes(step.config, step.layout, batch) / links.pipeline
    exposed = 2 * (step.layout.pipeline - 1) * hop
    hidden = 0.0
    for kind in traffic:
        if kind.overlaps:
            hidden += kind.seconds
        elif kind.kind != "pipeline":
            exposed += kind.seconds
    exposed += max(hidden - busy, hidden * (1 - _HIDDEN_SHARE))
    update = _update_seconds(step, bounds, links)
    total = chain + exposed + update
    forward, backward, _ = step_flops(step)
    layout = step.layout
    shared = layout.pipeline * layout.tensor
    ideal = (forward + backward) / (links.device.peak(layout.precision) * shared)
    tokens = layout.data * sum(batch.tokens for batch in step.micro_batches)
    return Timing(total, busy, bubble, exposed, update, ideal / total, tokens / total)


def days(timing: Timing, steps: int) -> float:
    """Days of a schedule of so many steps."""
    return timing.step * steps / _DAY


def pipelined(stages: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Seconds of 1F1B over stages × micro-batches, and the share that an average stage idles.

    The slowest stage works through all its micro-batches; filling and draining add one average
    micro-batch of every other stage.
    """
    count = len(stages[0])
    slowest = max(stages, key=sum)
    total = sum(slowest) + (sum(map(sum, stages)) - sum(slowest)) / count
    busy = sum(map(sum, stages)) / len(stages)
    return total, 1 - busy / total


def _stage_seconds(step: Step, bounds: Sequence[int], stage: int, links: Links) -> list[float]:
    """Seconds that a stage computes for each micro-batch, forward and backward."""
    layout, device = step.layout, links.device
    names = unit_names(step.config)
    parameters = unit_parameters(step.config, layout.pipeline > 1)
    speed = device.peak(layout.precision) * device.efficiency * layout.tensor
    size = 4 if layout.precision == "fp32" else 2

    def seconds(batch: MicroBatch) -> float:
        flops = sample_flops(step.config, batch)
        total = 0.0
        for unit in range(bounds[stage], bounds[stage + 1]):
            work = batch.samples * flops[unit] / speed
            # However few the tokens, the weights are read once a pass; look-ups read few rows.
            read = parameters[unit].local(layout.tensor) * size / device.memory_bandwidth
            floor = 0.0 if names[unit] == "embedding" else read
            total += max(work, floor) * passes(names[unit], step.recomputation)
            if step.recomputation == "selective" and is_layer(names[unit]):
                layer = layer_of(step, names[unit], batch)
                again = layer.saved - layer.kept("selective")
                total += batch.samples * _TOUCHES * again / device.memory_bandwidth
        return total

    return [seconds(batch) for batch in step.micro_batches]


def _update_seconds(step: Step, bounds: Sequence[int], links: Links) -> float:
    layout = step.layout
    units = unit_parameters(step.config, layout.pipeline > 1)
    largest = max(
        sum(unit.local(layout.tensor) for unit in units[bounds[s] : bounds[s + 1]])
        for s in range(layout.pipeline)
    )
    share = partition(largest, layout.data)
    accumulated = len(step.micro_batches) * largest if layout.precision != "fp32" else 0
    moved = _UPDATE_BYTES * share + _ACCUMULATE_BYTES * accumulated
    return moved / links.device.memory_bandwidth
