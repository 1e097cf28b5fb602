"""The backend for CPUs: checks, memory and tables for the C++ kernels in `csrc/cpu`."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.ops.block_tables import block_table
from megatron_nuwa.ops.native import operators, why_missing
from megatron_nuwa.ops.tables import Geometry

DTYPES = (torch.float32, torch.bfloat16)
INSTRUCTION_SETS = ("generic", "avx2", "avx512")
INSTRUCTION_SET_VARIABLE = "MEGATRON_NUWA_CPU_INSTRUCTIONS"

_HEAD_DIM_MULTIPLE = 16


def why_not(query: Tensor) -> str | None:
    """Why the backend cannot take this query, or None when it can."""
    if query.device.type != "cpu":
        return f"it takes tensors on the CPU, and query is on {query.device}"
    if query.dtype not in DTYPES:
        return f"it takes float32 and bfloat16, and query is {query.dtype}"
    return why_missing("cpu")


def available_instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this machine can run, the fastest last."""
    if why_missing("cpu"):
        return ()
    return INSTRUCTION_SETS[: operators("cpu").cpu_best_instruction_set() + 1]


def instruction_set() -> str:
    """The instruction set in use: the fastest, or the one that the environment names.

    Raises `ValueError` where the environment variable names one that this machine lacks.
    """
    available = available_instruction_sets()
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if wanted is None:
        return available[-1]
    if wanted not in available:
        raise ValueError(
            f"{INSTRUCTION_SET_VARIABLE} must be one of {', '.join(available)} on this machine, "
            f"not {wanted!r}"
        )
    return wanted


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Output in the query's dtype, and the log-sum-exp of the scores, float (batch, heads, tokens).

    Like every backend's, `forward` trusts that `nearby_attention` has checked the tensors.
    """
    return walk(query, key, value, mask, block_table(geometry, mirrored=False), scale)


def walk(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, table: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`forward` over any packed table of `block_tables`."""
    batch, tokens, heads, size = query.shape
    query, key, value = _prepared(query, key, value)
    output = torch.empty_like(query)
    log_sum = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    operators("cpu").cpu_forward(
        query, key, value, _contiguous(mask), output, log_sum, table, scale, instruction_number()
    )
    return output[..., :size], log_sum


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtype; `output` is not needed."""
    size = query.shape[-1]
    grad, query, key, value = _prepared(grad, query, key, value)
    gradients = [torch.empty_like(t) for t in (query, key, value)]
    operators("cpu").cpu_backward(
        grad,
        query,
        key,
        value,
        _contiguous(mask),
        log_sum,
        *gradients,
        torch.empty_like(log_sum),
        block_table(geometry, mirrored=False),
        block_table(geometry, mirrored=True),
        scale,
        instruction_number(),
    )
    grad_query, grad_key, grad_value = (gradient[..., :size] for gradient in gradients)
    return grad_query, grad_key, grad_value


def _prepared(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, and with zeros up to a head size that fills whole vectors."""
    missing = -tensors[0].shape[-1] % _HEAD_DIM_MULTIPLE
    if missing:
        return [F.pad(t, (0, missing)) for t in tensors]
    return [t.contiguous() for t in tensors]


def _contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def instruction_number() -> int:
    """The kernels' own number of the instruction set in use."""
    return INSTRUCTION_SETS.index(instruction_set())
