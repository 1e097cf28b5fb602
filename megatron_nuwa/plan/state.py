"""Bytes of weights, gradients and optimizer in one process, as DeepSpeed 0.19.8 allocates them.

Read from its `runtime/`: bf16_optimizer.py, zero/stage_1_and_2.py and
zero/stage3.py. Adam is taken to be fused: PyTorch's plain one adds two temporaries of the size of
the master weights in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_nuwa.parallel.deepspeed_config import FP32_NAMES
from megatron_nuwa.parallel.layout import Layout, bf16_settings

# DeepSpeed's defaults, in elements.
_REDUCE_BUCKET = 500_000_000
_LIVE_PARAMETERS = 1_000_000_000
_FULL = 4
_ADAM = 8


@dataclass(frozen=True)
class StateBytes:
    """Bytes that live through the whole step, and DeepSpeed's buffers.

    `optimizer` holds the fp32 master weights and both moments; `host` is what offloading moves to
    the node's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    host: int


def state_bytes(
    parameters: int, largest: int, layout: Layout, deepspeed: Mapping[str, Any]
) -> StateBytes:
    """State of `parameters` in one process, whose largest tensor has `largest` elements."""
    unit = _FULL if layout.precision == "fp32" else 2
    zero = deepspeed.get("zero_optimization") or {}
    share = partition(parameters, layout.data)
    accumulator = _accumulator(deepspeed, unit)
    bucket = min(int(zero.get("reduce_bucket_size", _REDUCE_BUCKET)), parameters) * unit
    master_and_moments = (_FULL + _ADAM) * share
    if layout.zero_stage == 1 and _is_bf16_optimizer(layout, accumulator):
        # Its fp32 gradients are not divided, and every half gradient is widened on its way there.
        # It may stay until the next backward pass or not.
        stays = 0 if bf16_settings(deepspeed).get("immediate_grad_update") else unit
        return StateBytes(
            unit * parameters,
            (stays + _FULL) * parameters,
            master_and_moments,
            (unit - stays + _FULL) * largest,
            0,
        )
    if layout.zero_stage in (1, 2):
        whole = parameters if layout.zero_stage == 1 else 0
        accumulated = accumulator * share if layout.zero_stage == 2 else 0
        gradients = unit * whole + accumulated
        buffers = bucket * (2 if zero.get("overlap_comm") else 1)
        weights = unit * parameters
    else:
        live = min(int(zero.get("stage3_max_live_parameters", _LIVE_PARAMETERS)), parameters)
        gradients = accumulator * share
        buffers = unit * live + bucket
        weights = unit * share
    if layout.offload:
        return StateBytes(weights, gradients, 0, buffers, master_and_moments + _FULL * share)
    # The gradients of the step's update are fp32.
    return StateBytes(weights, gradients + _FULL * share, master_and_moments, buffers, 0)


def partition(parameters: int, ranks: int) -> int:
    """Elements of one ZeRO partition; DeepSpeed pads the whole to two elements a rank."""
    return -(-parameters // (2 * ranks)) * 2


def _accumulator(deepspeed: Mapping[str, Any], unit: int) -> int:
    name = (deepspeed.get("data_types") or {}).get("grad_accum_dtype")
    return _FULL if name in FP32_NAMES else unit


def _is_bf16_optimizer(layout: Layout, accumulator: int) -> bool:
    return layout.precision == "bf16" and accumulator == _FULL and not layout.offload
