"""The backend for NVIDIA GPUs: checks, memory and tables for the kernels in `csrc/cuda`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.ops.native import operators, why_missing
from megatron_nuwa.ops.schedule import Sharing, schedule
from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.ops.warp_tables import Sums, row_tables, shape_of, warp_tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 128)
# Bytes of shared memory that the most demanding tensor-core kernel of a head size takes, where a
# multiprocessor has that of compute capability 9.0 (True) and where it has less.
SHARED_BYTES = {
    False: {32: 35_328, 64: 68_096, 128: 124_416},
    True: {32: 105_472, 64: 231_424, 128: 165_888},
}


def why_not(query: Tensor) -> str | None:
    """Why the backend cannot take this query, or None when it can."""
    if query.device.type != "cuda":
        return f"it takes tensors on a CUDA device, and query is on {query.device}"
    if query.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, and query is {query.dtype}"
    if query.shape[-1] > HEAD_DIMS[-1]:
        return f"it takes head sizes up to {HEAD_DIMS[-1]}, and query has {query.shape[-1]}"
    reason = _why_not_device(query.device, query.dtype, query.shape[-1])
    return reason or why_missing("cuda")


@torch.compiler.assume_constant_result
def is_ready(device: torch.device, head_dim: int) -> bool:
    """Whether the tensor-core kernels run on this device for heads of this size."""
    return (
        device.type == "cuda"
        and head_dim <= HEAD_DIMS[-1]
        and _why_not_device(device, torch.bfloat16, head_dim) is None
        and why_missing("cuda") is None
    )


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Output in the query's dtype, and the log-sum-exp of the scores, float (batch, heads, tokens).

    Raises `ValueError` where tensors have other numbers of tokens than the geometry.
    """
    _check_tokens(query, key, geometry)
    if scale < 0:  # the kernels keep the largest product, not the largest score
        return forward(-query, key, value, mask, geometry, -scale)
    size = query.shape[-1]
    query, key, value = _prepared(query, key, value)
    output, log_sum = operators("cuda").cuda_forward(
        query, key, value, _contiguous(mask), tables(query, geometry, "outputs"), scale
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
    """Gradients of query, key and value in their dtype; the same bits on every run."""
    _check_tokens(query, key, geometry)
    size = query.shape[-1]
    grad, query, key, value, output = _prepared(grad, query, key, value, output)
    gradients = operators("cuda").cuda_backward(
        grad,
        query,
        key,
        value,
        _contiguous(mask),
        output,
        log_sum,
        tables(query, geometry, "query gradients"),
        tables(query, geometry, "context gradients"),
        scale,
    )
    grad_query, grad_key, grad_value = (gradient[..., :size] for gradient in gradients)
    return grad_query, grad_key, grad_value


def tables(query: Tensor, geometry: Geometry, sums: Sums) -> list[Tensor]:
    """The tables that the kernels for this dtype and head size walk, on the query's device."""
    mirrored = sums == "context gradients"
    if query.dtype == torch.float32:
        return list(row_tables(geometry, mirrored, query.device))
    shape = shape_of(query.shape[-1], sums, _is_large(query.device))
    sharing = Sharing(query.shape[0], query.shape[2], shape.teams * _processors(query.device))
    return [
        *warp_tables(geometry, mirrored, shape, query.device),
        schedule(geometry, mirrored, shape, sharing, query.device),
    ]


def _why_not_device(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    has = torch.cuda.get_device_properties(device)
    # Machine code for sm_80 runs on all of 8.x; that for sm_90a on 9.0 alone.
    if has.major != 8 and (has.major, has.minor) != (9, 0):
        return (
            f"it is built for compute capabilities 8.x and 9.0, and {device} has "
            f"{has.major}.{has.minor}"
        )
    # The driver keeps a KiB of every block's.
    needed = SHARED_BYTES[_is_large(device)][_built_size(head_dim)] + 1024
    there = has.shared_memory_per_multiprocessor
    if dtype != torch.float32 and there < needed:
        return (
            f"head size {head_dim} needs {needed:,} bytes of shared memory, and {device} has "
            f"{there:,}"
        )
    return None


def _is_large(device: torch.device) -> bool:
    """Whether the kernels' deeper ring is the one that is built for this device."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 9


def _processors(device: torch.device) -> int:
    """Multiprocessors of a device; two of the one that tests simulate on a CPU."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _built_size(head_dim: int) -> int:
    return next(size for size in HEAD_DIMS if size >= head_dim)


def _check_tokens(query: Tensor, key: Tensor, geometry: Geometry) -> None:
    """The kernels trust their tables, so a table of another grid must never reach them."""
    for name, tensor, grid in (
        ("query", query, geometry.grid),
        ("key", key, geometry.context_grid),
    ):
        if tensor.shape[1] != grid.cells:
            raise ValueError(f"{name} must have {grid.cells} tokens, not {tensor.shape[1]}")


def _prepared(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, aligned for 16-byte reads, and with zeros up to a head size that is built."""
    size = tensors[0].shape[-1]
    missing = _built_size(size) - size
    if missing:
        return [F.pad(t, (0, missing)) for t in tensors]
    return [t if t.data_ptr() % 16 == 0 else t.clone() for t in (t.contiguous() for t in tensors)]


def _contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()
