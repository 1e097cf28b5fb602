"""Memory of one process by part, at the fullest moment of a step that is not the first.

That moment is the end of the forward pass of the last micro-batch in flight: everything that
autograd keeps is there, and the loss or one layer is being differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_nuwa.models.flops import unit_names
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.parallel.units import Recomputation
from megatron_nuwa.plan.activations import LayerBytes, layer_bytes
from megatron_nuwa.plan.devices import Device
from megatron_nuwa.plan.parameters import unit_parameters
from megatron_nuwa.plan.state import state_bytes
from megatron_nuwa.plan.workload import MicroBatch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INDEX = 8
_FULL = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by part.

    `activations`: what the layers keep for all micro-batches in flight. `logits`: the head's
    output, the loss and their gradients. `working`: one layer's backward pass beyond the logits,
    and DeepSpeed's buffers. `host`: the node's memory, not the device's.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    framework: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(value for name, value in asdict(self).items() if name != "host")


@dataclass(frozen=True)
class Step:
    """What a replica runs in a step, and how."""

    config: NuwaConfig
    layout: Layout
    deepspeed: Mapping[str, Any]
    micro_batches: Sequence[MicroBatch]
    recomputation: Recomputation


def stage_memory(step: Step, bounds: Sequence[int], stage: int, device: Device) -> Memory:
    """Memory of one process of a pipeline stage; `bounds` are those of `parallel.cut`."""
    layout, config = step.layout, step.config
    start, end = bounds[stage], bounds[stage + 1]
    units = unit_parameters(config, layout.pipeline > 1)[start:end]
    state = state_bytes(
        sum(unit.local(layout.tensor) for unit in units),
        max(unit.largest for unit in units),
        layout,
        step.deepspeed,
    )
    names = unit_names(config)[start:end]
    # 1F1B: a stage has started as many micro-batches as there are stages from it to the end.
    in_flight = min(len(step.micro_batches), layout.pipeline - stage)
    kept = sorted((_kept(step, names, batch) for batch in step.micro_batches), reverse=True)
    has_head = names[-1] == "head"
    logits = max(_logits(step, batch) for batch in step.micro_batches) if has_head else 0
    layer = max(_working(step, names, batch) for batch in step.micro_batches)
    activations, working = sum(kept[:in_flight]), max(layer - logits, 0) + state.buffers
    lost = int(device.slack * (activations + logits + working))
    # On a CPU there is nowhere else to offload to.
    host = 0 if device.name == "cpu" else state.host
    return Memory(
        state.weights,
        state.gradients,
        state.optimizer + state.host - host,
        activations,
        logits,
        working + lost,
        device.framework,
        host,
    )


def fullest_stage(step: Step, bounds: Sequence[int], device: Device) -> tuple[int, Memory]:
    """The stage whose processes need most, and their memory."""
    memories = [stage_memory(step, bounds, s, device) for s in range(step.layout.pipeline)]
    stage = max(range(len(memories)), key=lambda s: memories[s].total)
    return stage, memories[stage]


def kept_bytes(step: Step, batch: MicroBatch) -> int:
    """What autograd keeps of a whole forward pass of one micro-batch, loss included."""
    saved_logits = _logit_count(step, batch) * _element_size(step)
    return _kept(step, unit_names(step.config), batch) + saved_logits


def _kept(step: Step, names: Sequence[str], batch: MicroBatch) -> int:
    config, size = step.config, _element_size(step)
    target = batch.tokens * config.width * size
    context = batch.context_tokens * config.width * size
    is_projected = config.visual_embedding == "codebook"
    codes = config.code_dim * size if is_projected else 0
    is_sketch = batch.context[0] == "sketch"
    read = config.sketch_code_dim * size if is_projected and is_sketch else 0
    total = 0
    for name in names:
        if name == "embedding":
            total += batch.tokens * (codes + _INDEX) + batch.context_tokens * (read + _INDEX)
        elif name == "encoder_norm":
            total += context
        elif name == "head":
            # The norm's input and output; the logits are counted on their own.
            total += 2 * target + batch.tokens * _INDEX
        else:
            total += batch.samples * layer_of(step, name, batch).kept(step.recomputation)
    reads_context = any(name.startswith("decoder.") for name in names)
    return total + (context if reads_context else 0)


def _working(step: Step, names: Sequence[str], batch: MicroBatch) -> int:
    layers = {name for name in names if name.startswith(("encoder.", "decoder."))}
    return batch.samples * max(
        (layer_of(step, name, batch).working(step.recomputation) for name in layers), default=0
    )


def layer_of(step: Step, name: str, batch: MicroBatch) -> LayerBytes:
    """Bytes of one sample of a micro-batch in the layer with this unit name."""
    layout = step.layout
    kind = "encoder" if name.startswith("encoder.") else "decoder"
    dtype = _DTYPES[layout.precision]
    found = layer_bytes(step.config, kind, batch.context, batch.grid, dtype, layout.tensor)
    if not layout.sequence_parallel:
        return found
    # The inputs of norms are spread over the group; products keep their gathered inputs.
    sequential = kind == "decoder" and step.config.cross_attention == "sequential"
    spread = found.inputs // layout.tensor
    elsewhere = (3 if sequential else 2) * (found.inputs - spread)
    return LayerBytes(found.saved - elsewhere, found.outputs, spread, found.gradients)


def _logits(step: Step, batch: MicroBatch) -> int:
    """While the loss is differentiated: the logits, and their gradient.

    A split vocabulary has fp32 copies of both beside them.
    """
    wide = 2 * _FULL if step.layout.tensor > 1 else 0
    return _logit_count(step, batch) * (2 * _element_size(step) + wide)


def _logit_count(step: Step, batch: MicroBatch) -> int:
    return batch.tokens * step.config.codebook_size // step.layout.tensor


def _element_size(step: Step) -> int:
    return _DTYPES[step.layout.precision].itemsize
