"""`nearby_attention`: checks, choice of backend, and registration with PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import cuda
from megatron_nuwa.ops.backends import BACKEND_NAMES, backend_for
from megatron_nuwa.ops.tables import Geometry

Backend = Literal["auto", "reference", "cpu", "cuda"]

# Cells of a context; where more are to be seen, dense kernels have the better of it.
_SMALL_CONTEXT = 256
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def nearby_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Iterable[int],
    context_grid: Iterable[int] | None = None,
    extent: Iterable[int | None],
    causal: bool = False,
    context_mask: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """3-D nearby attention (paper Eqs. 5–9): each query attends to the context cells near it.

    Args:
        query: (batch, h·w·s, heads, head_dim), cells in generation order.
        key, value: (batch, h'·w'·s', heads, head_dim), cells in generation order.
        grid: the queries' (h, w, s).
        context_grid: the keys' (h', w', s'); `grid` when left out.
        extent: window width (e_h, e_w, e_s), odd, or None for unbounded. Windows are truncated
            at borders, never shifted.
        causal: a query sees no cell that comes after it; only where both grids are equal.
        context_mask: bool (batch, h'·w'·s'), False = padding.
        scale: of the scores; 1/√head_dim when left out.
        backend: "auto" takes the fastest that can run these tensors; a name insists on one.

    Returns:
        (batch, h·w·s, heads, head_dim) in the query's dtype; zeros for a query that sees no key.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
        NotImplementedError: in forward-mode differentiation, which it has no formula for.
    """
    _check_kinds(query, key, value, context_mask, causal, scale)
    query, key, value = _autocast(query, key, value)
    geometry = _check(query, key, value, grid, context_grid, extent, causal, context_mask, backend)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if (
        geometry.sees_everything
        and backend == "auto"
        and not _is_small_and_masked(query, context_mask, geometry)
    ):
        return _dense_attention(query, key, value, context_mask, causal, scale)
    output, _ = _forward_op(
        query,
        key,
        value,
        context_mask,
        list(geometry.grid),
        list(geometry.context_grid),
        [width or 0 for width in geometry.extent],
        causal,
        scale,
        backend,
    )
    return output


def _check_kinds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> None:
    """Raise on the first argument that is nothing of the sort that is wanted."""
    tensors = {"query": query, "key": key, "value": value, "context_mask": context_mask}
    for name, tensor in tensors.items():
        if name == "context_mask" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, not {causal!r}")
    if scale is not None and not isinstance(scale, Real | torch.SymFloat | Tensor):
        raise TypeError(f"scale must be a number, not {scale!r}")
    if torch.compiler.is_compiling():
        return
    for name in ("query", "key", "value"):
        # PyTorch would take the operator for a constant.
        if forward_ad.unpack_dual(tensors[name]).tangent is not None:
            raise NotImplementedError(
                f"nearby_attention has no forward-mode derivative, and {name} asks for one; "
                "differentiate backward"
            )


# PyTorch 2.11 does not trace the question itself.
@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype, but for float64, which PyTorch's own attention keeps as well."""
    device_type = tensors[0].device.type
    if not _has_autocast(device_type):
        return tensors
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    narrower = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if t.dtype in narrower else t for t in tensors)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Iterable[int],
    context_grid: Iterable[int] | None,
    extent: Iterable[int | None],
    causal: bool,
    context_mask: Tensor | None,
    backend: str,
) -> Geometry:
    """Raise on the first argument that does not fit; return the geometry of the call."""
    own = Grid.of(grid)
    context = own if context_grid is None else Grid.of(context_grid, "context_grid")
    geometry = Geometry(own, context, Extent.of(extent), causal)
    if causal and own != context:
        raise ValueError(
            f"causal needs context_grid equal to grid; they are {tuple(context)} and {tuple(own)}"
        )
    for name, tensor, cells in (
        ("query", query, own.cells),
        ("key", key, context.cells),
        ("value", value, context.cells),
    ):
        _check_tensor(name, tensor, query, cells)
    if context_mask is not None:
        _check_mask(context_mask, query, context.cells)
    if backend not in BACKEND_NAMES:
        raise ValueError(f"backend must be one of {', '.join(BACKEND_NAMES)}, not {backend!r}")
    return geometry


def _check_tensor(name: str, tensor: Tensor, query: Tensor, cells: int) -> None:
    if tensor.dim() != 4:
        raise ValueError(
            f"{name} must be (batch, tokens, heads, head_dim), not {tuple(tensor.shape)}"
        )
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {tensor.dtype}")
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must have the query's dtype {query.dtype}, not {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(
            f"{name} must be on the query's device {query.device}, not {tensor.device}"
        )
    if tensor.shape[3] == 0:
        raise ValueError(f"{name} must have a head_dim of at least 1, not 0")
    expected = (query.shape[0], cells, query.shape[2], query.shape[3])
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} must have shape {expected} for its grid, not {tuple(tensor.shape)}"
        )


def _check_mask(mask: Tensor, query: Tensor, cells: int) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"context_mask must be bool (False = padding), not {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(
            f"context_mask must be on the query's device {query.device}, not {mask.device}"
        )
    if tuple(mask.shape) != (query.shape[0], cells):
        raise ValueError(
            f"context_mask must have shape {(query.shape[0], cells)}, not {tuple(mask.shape)}"
        )


def _is_small_and_masked(query: Tensor, mask: Tensor | None, geometry: Geometry) -> bool:
    """Whether the CUDA kernels are faster than PyTorch's attention though all is to be seen.

    On an H200, forward and backward of a clip's tokens over 77 padded words take 0.55 ms of them,
    and 0.86 ms of PyTorch's fastest with a mask; without a mask both are alike.
    """
    return (
        mask is not None
        and geometry.context_grid.cells <= _SMALL_CONTEXT
        and query.dtype in (torch.bfloat16, torch.float16)
        and cuda.is_ready(query.device, query.shape[-1])
    )


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """PyTorch's own attention, for windows that cover the whole context."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if mask is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
        return output.transpose(1, 2)
    allowed = mask[:, None, None, :]
    # Padding may hold a NaN, which its probability of 0 would not keep from the sums.
    key, value = (t.masked_fill(~mask[:, None, :, None], 0) for t in (key, value))
    if not causal:
        # A sample without keys would be NaN: let it see everything, of values that are zeros.
        has_keys = allowed.any(-1, keepdim=True)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed | ~has_keys, scale=scale
        )
        return output.transpose(1, 2)
    tokens = query.shape[2]
    allowed = allowed & torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    # Here single queries may have no key, and the values are not theirs alone.
    has_keys = allowed.any(-1, keepdim=True)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed | ~has_keys, scale=scale
    )
    return output.masked_fill(~has_keys, 0).transpose(1, 2)


def _geometry(grid: list[int], context: list[int], extent: list[int], causal: bool) -> Geometry:
    return Geometry(Grid(*grid), Grid(*context), Extent(*(e or None for e in extent)), causal)


@torch.library.custom_op("megatron_nuwa::nearby_attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_mask: Tensor | None,
    grid: list[int],
    context_grid: list[int],
    extent: list[int],
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(grid, context_grid, extent, causal)
    chosen = backend_for(query, backend)
    output, log_sum = chosen.forward(query, key, value, context_mask, geometry, scale)
    return output.contiguous(), log_sum.contiguous()


@_forward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    wide = query.dtype if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(batch, heads, tokens, dtype=wide)


@torch.library.custom_op("megatron_nuwa::nearby_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_mask: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    grid: list[int],
    context_grid: list[int],
    extent: list[int],
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = _geometry(grid, context_grid, extent, causal)
    gradients = backend_for(query, backend).backward(
        grad, query, key, value, context_mask, output, log_sum, geometry, scale
    )
    grad_query, grad_key, grad_value = (gradient.contiguous() for gradient in gradients)
    return grad_query, grad_key, grad_value


@_backward_op.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, context_mask, *settings = inputs
    ctx.save_for_backward(query, key, value, context_mask, *output)
    ctx.settings = settings


def _differentiate(ctx: Any, grad: Tensor, _grad_log_sum: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, context_mask, output, log_sum = ctx.saved_tensors
    gradients = _backward_op(grad, query, key, value, context_mask, output, log_sum, *ctx.settings)
    return (*gradients, None, *(None for _ in ctx.settings))


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)
