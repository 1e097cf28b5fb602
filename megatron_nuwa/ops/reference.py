"""The backend in plain PyTorch: right on every device, and what the fused ones are held against."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from megatron_nuwa.ops import dense, gather
from megatron_nuwa.ops.tables import Geometry, key_table

# One slot of the gather walk costs about as much as this many columns of the dense product.
_DENSE_COLUMNS_A_SLOT = 32
# Above this many (query, key) cells a head, dense scores take more memory than they save time.
_DENSE_CELLS = 1 << 20


def why_not(query: Tensor) -> str | None:
    """None: this backend takes every floating-point tensor on every device."""
    return None


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Output in the query's dtype, and the log-sum-exp of the scores (batch, heads, tokens)."""
    form = _cheaper_form(geometry, query.device)
    seen = _seen(mask, key, value)
    with _exact(query.device):
        output, log_sum = form.forward(*_promoted(query, *seen), mask, geometry, scale)
    return output.to(query.dtype), log_sum


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
    """Gradients of query, key and value in their dtype."""
    form = _cheaper_form(geometry, query.device)
    seen = _seen(mask, key, value)
    with _exact(query.device):
        gradients = form.backward(
            *_promoted(grad, query, *seen),
            mask,
            *_promoted(output),
            log_sum,
            geometry,
            scale,
        )
    grad_query, grad_key, grad_value = (gradient.to(query.dtype) for gradient in gradients)
    return grad_query, grad_key, grad_value


def _cheaper_form(geometry: Geometry, device: torch.device) -> ModuleType:
    slots = key_table(geometry, device).width
    queries, keys = geometry.grid.cells, geometry.context_grid.cells
    is_dense = keys <= _DENSE_COLUMNS_A_SLOT * slots and queries * keys <= _DENSE_CELLS
    return dense if is_dense else gather


def _exact(device: torch.device) -> AbstractContextManager[object]:
    """Keeps autocast from narrowing the products of what has been promoted."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _seen(mask: Tensor | None, *context: Tensor) -> list[Tensor]:
    """Zeros for padding, which may hold a NaN that a probability of 0 keeps from no sum."""
    if mask is None:
        return list(context)
    return [t.masked_fill(~mask[:, :, None, None], 0) for t in context]


def _promoted(*tensors: Tensor) -> list[Tensor]:
    """Half precisions in fp32, because sums over a window in them lose digits."""
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]
