"""What one process sends in a step, over which link, and for how long.

Volumes are those of ring algorithms: an all-reduce of n bytes among g processes sends
2·(g − 1)/g·n from each, a gather or a scatter half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_nuwa.models.flops import unit_names
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.parallel.deepspeed_config import communication_dtype
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.plan.devices import LINK_EFFICIENCY, Device
from megatron_nuwa.plan.memory import Step
from megatron_nuwa.plan.parameters import unit_parameters
from megatron_nuwa.plan.workload import MicroBatch

Kind = Literal["data_parallel", "zero_gather", "tensor_parallel", "pipeline"]
_FULL = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step, and the seconds that they take alone.

    `overlaps`: DeepSpeed sends them while it computes.
    """

    kind: Kind
    bytes: int
    seconds: float
    overlaps: bool = False


@dataclass(frozen=True)
class Links:
    """Speeds between the processes of a layout, bytes/s and process.

    Ranks are counted tensor first, then data, then pipeline; nodes take consecutive ranks.
    """

    layout: Layout
    device: Device
    gpus_per_node: int

    @property
    def tensor(self) -> float:
        """Inside a tensor-parallel group."""
        return self._ring(self.layout.tensor, 1)

    @property
    def data(self) -> float:
        """Inside a data-parallel group."""
        return self._ring(self.layout.data, self.layout.tensor)

    @property
    def pipeline(self) -> float:
        """From a stage to the next."""
        inside = self.layout.world_size <= self.gpus_per_node
        return self._reached(self.device.node_link if inside else self.device.network)

    def _ring(self, members: int, stride: int) -> float:
        """A ring through `members` ranks that lie `stride` apart."""
        if members * stride <= self.gpus_per_node:
            return self._reached(self.device.node_link)
        # NCCL opens as many rings as the members of a node have network cards.
        beside = max(self.gpus_per_node // stride, 1)
        return self._reached(min(self.device.node_link, beside * self.device.network))

    def _reached(self, speed: float) -> float:
        return speed * LINK_EFFICIENCY


def communication(step: Step, bounds: Sequence[int], links: Links) -> list[Traffic]:
    """All kinds of traffic of the stage that sends most of each."""
    found = [_data_parallel(step, bounds, links), _zero_gather(step, bounds, links)]
    found += [_tensor_parallel(step, bounds, links), _pipeline(step, links)]
    return found


def _data_parallel(step: Step, bounds: Sequence[int], links: Links) -> Traffic:
    layout = step.layout
    parameters = _largest_stage(step, bounds)
    zero = step.deepspeed.get("zero_optimization") or {}
    chosen = communication_dtype(step.deepspeed)
    unit = {None: _element_size(layout), "fp32": _FULL}.get(chosen, 2)
    if layout.zero_stage >= 2:
        # Gradients are scattered after every micro-batch.
        volume = _ring_volume(parameters * unit, layout.data) * len(step.micro_batches)
        overlaps = bool(zero.get("overlap_comm", layout.zero_stage == 3))
    else:
        # One all-reduce after the last backward pass.
        volume, overlaps = 2 * _ring_volume(parameters * unit, layout.data), False
    return Traffic("data_parallel", volume, volume / links.data, overlaps)


def _zero_gather(step: Step, bounds: Sequence[int], links: Links) -> Traffic:
    layout = step.layout
    once = _ring_volume(_largest_stage(step, bounds) * _element_size(layout), layout.data)
    if layout.zero_stage < 3:
        return Traffic("zero_gather", once, once / links.data)
    # Forward, backward, and once more where the forward pass is repeated.
    passes = 2 if step.recomputation == "none" else 3
    volume = once * passes * len(step.micro_batches)
    return Traffic("zero_gather", volume, volume / links.data, overlaps=True)


def _tensor_parallel(step: Step, bounds: Sequence[int], links: Links) -> Traffic:
    layout, config = step.layout, step.config
    if layout.tensor == 1:
        return Traffic("tensor_parallel", 0, 0.0)
    names = unit_names(config)
    stages = [names[bounds[s] : bounds[s + 1]] for s in range(layout.pipeline)]
    reduced = max(
        sum(_reduced_bytes(step, batch, stage) for batch in step.micro_batches) for stage in stages
    )
    volume = 2 * _ring_volume(reduced, layout.tensor)
    return Traffic("tensor_parallel", volume, volume / links.tensor)


def _reduced_bytes(step: Step, batch: MicroBatch, names: Sequence[str]) -> int:
    """Bytes all-reduced for one micro-batch: after each row-parallel product, and its mirror.

    An encoder layer has two such products. A decoder layer's parallel attentions are summed
    before they are reduced, so it has two as well, and three when they are sequential. Backward
    has as many for the inputs, and one for cross-attention's context; repeated layers reduce
    again. Sequence parallelism gathers and scatters, which is the same volume.
    """
    config, size = step.config, _element_size(step.layout)
    target = batch.tokens * config.width * size
    context = batch.context_tokens * config.width * size
    passes = 3 if step.recomputation == "layer" else 2
    products = 3 if config.cross_attention == "sequential" else 2
    is_projected = config.visual_embedding == "codebook"
    looked_up = batch.tokens * (config.code_dim if is_projected else config.width) * size
    read = context
    if batch.context[0] == "sketch" and is_projected:
        read = batch.context_tokens * config.sketch_code_dim * size
    bytes_of = {
        "encoder": 2 * passes * context,
        "decoder": products * passes * target + context,
        # Vocabulary-parallel look-ups forward; the head's input backward.
        "embedding": looked_up + read,
        "head": target,
        "encoder_norm": 0,
    }
    return sum(bytes_of[name.partition(".")[0]] for name in names)


def _pipeline(step: Step, links: Links) -> Traffic:
    layout = step.layout
    if layout.pipeline == 1:
        return Traffic("pipeline", 0, 0.0)
    volume = 2 * sum(boundary_bytes(step.config, layout, batch) for batch in step.micro_batches)
    return Traffic("pipeline", volume, volume / links.pipeline)


def boundary_bytes(config: NuwaConfig, layout: Layout, batch: MicroBatch) -> int:
    """What a stage hands to the next for one micro-batch: target, context, mask and tokens."""
    vectors = (batch.tokens + batch.context_tokens) * config.width
    mask = batch.context_tokens if batch.context[0] == "text" else 0
    return vectors * _element_size(layout) + mask + 8 * batch.tokens


def _largest_stage(step: Step, bounds: Sequence[int]) -> int:
    units = unit_parameters(step.config, step.layout.pipeline > 1)
    return max(
        sum(unit.local(step.layout.tensor) for unit in units[bounds[s] : bounds[s + 1]])
        for s in range(step.layout.pipeline)
    )


def _ring_volume(size: int, members: int) -> int:
    return size * (members - 1) // members


def _element_size(layout: Layout) -> int:
    return _FULL if layout.precision == "fp32" else 2
