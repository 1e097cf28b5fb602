"""Nearby attention while decoding: a few cells at a time against cached keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import cpu
from megatron_nuwa.ops.block_tables import linear_cells, tiled_table
from megatron_nuwa.ops.tables import Geometry, key_table

# Layers that decode the same cell share a table; an older cell's is not needed again soon.
_CACHED_STEPS = 256
_BACKENDS = ("auto", "reference", "cpu")


class RingCache:
    """Keys and values of the last frames of a grid: all that causal decoding looks back on.

    It holds ⌊e_s/2⌋ + 1 frames, or the whole grid where that is less; the cell n lies in slot
    n mod slots of `keys` and `values`, both (batch, slots, heads, head_dim).
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        grid: Iterable[int],
        extent: Iterable[int | None],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.grid, self.extent = Grid.of(grid), Extent.of(extent)
        shape = (batch, ring_slots(self.grid, self.extent), heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.position = 0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Add the next cells' keys and values, and look back from those cells.

        All of (batch, steps, heads, head_dim), for the cells position … position + steps − 1.
        Raises `ValueError` past the end of the grid.
        """
        steps, frame = query.shape[1], self.grid.h * self.grid.w
        if self.position + steps > self.grid.cells:
            raise ValueError(
                f"query must have at most {self.grid.cells - self.position} steps, which is what "
                f"is left of grid {tuple(self.grid)}, not {steps}"
            )
        outputs = []
        start = 0
        while start < steps:
            # A frame at a time: the next one takes the place of one that this one looks back on.
            stop = min(steps, start + frame - self.position % frame)
            slots = torch.arange(self.position, self.position + stop - start)
            slots = (slots % self.keys.shape[1]).to(self.keys.device)
            self.keys.index_copy_(1, slots, key[:, start:stop])
            self.values.index_copy_(1, slots, value[:, start:stop])
            outputs.append(
                nearby_attention_step(
                    query[:, start:stop],
                    self.keys,
                    self.values,
                    position=self.position,
                    grid=self.grid,
                    extent=self.extent,
                    scale=scale,
                    backend=backend,
                )
            )
            self.position += stop - start
            start = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def ring_slots(grid: Grid, extent: Extent) -> int:
    """Cells that a ring cache holds: the current frame and the ⌊e_s/2⌋ before it."""
    frames = grid.s if extent.s is None else min(grid.s, extent.s // 2 + 1)
    return frames * grid.h * grid.w


def nearby_attention_step(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    position: int,
    grid: Iterable[int],
    context_grid: Iterable[int] | None = None,
    extent: Iterable[int | None],
    context_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The rows position … position + steps − 1 of `nearby_attention`, at constant cost a row.

    Args:
        query: (batch, steps, heads, head_dim), those cells of `grid` in generation order.
        key_cache, value_cache: (batch, slots, heads, head_dim). Without `context_grid`, a ring: the
            cell m of `grid` lies in slot m mod slots, the queries' own cells included, and the
            queries look back causally. With it, all of that context's cells.
        position: the first query's place in generation order.
        grid: the target's (h, w, s).
        context_grid: the keys' (h', w', s') for cross-attention, which is not causal.
        extent: window width (e_h, e_w, e_s), odd, or None for unbounded.
        context_mask: bool (batch, slots), False = padding.
        scale: of the scores; 1/√head_dim when left out.
        backend: "auto", "reference" (which also gives gradients) or "cpu".

    Returns:
        (batch, steps, heads, head_dim) in the query's dtype; zeros for a query that sees no key.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    own = Grid.of(grid)
    context = own if context_grid is None else Grid.of(context_grid, "context_grid")
    causal = context_grid is None
    geometry = Geometry(own, context, Extent.of(extent), causal)
    _check(query, key_cache, value_cache, position, geometry, context_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    span = _Span(geometry, position, query.shape[1], key_cache.shape[1])
    if _takes_cpu(query, key_cache, value_cache, backend):
        table = _block_table(span)
        return cpu.walk(query, key_cache, value_cache, context_mask, table, scale)[0]
    return _reference(query, key_cache, value_cache, context_mask, span, scale)


class _Span(NamedTuple):
    """Queries of one call, and the size of the ring they look into."""

    geometry: Geometry
    position: int
    steps: int
    slots: int


class _Neighbours(NamedTuple):
    """Slots that each query sees, (steps, width); `first` where all see the slots from there on."""

    slots: Tensor
    valid: Tensor
    first: int | None


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: int,
    geometry: Geometry,
    mask: Tensor | None,
) -> None:
    for name, tensor in (("query", query), ("key_cache", keys), ("value_cache", values)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, tokens, heads, head_dim), not {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point() or tensor.dtype != query.dtype:
            raise TypeError(
                f"{name} must be floating point and have the query's dtype {query.dtype}, "
                f"not {tensor.dtype}"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on the query's device {query.device}, not {tensor.device}"
            )
    batch, steps, heads, size = query.shape
    for name, tensor in (("key_cache", keys), ("value_cache", values)):
        expected = (batch, keys.shape[1], heads, size)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, not {tuple(tensor.shape)}")
    if not 0 <= position <= geometry.grid.cells - steps or steps < 1:
        raise ValueError(
            f"position must leave room for the query's {steps} steps in the {geometry.grid.cells} "
            f"cells of grid, not be {position}"
        )
    slots, needed = keys.shape[1], _slots_needed(geometry, position, steps)
    if slots < needed:
        raise ValueError(
            f"key_cache must have at least {needed} slots for {steps} steps from position "
            f"{position}, not {slots}"
        )
    if not geometry.causal and slots != needed:
        raise ValueError(f"key_cache must hold the {needed} cells of context_grid, not {slots}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"context_mask must be bool (False = padding), not {mask.dtype}")
    if mask is not None and tuple(mask.shape) != (batch, slots):
        raise ValueError(f"context_mask must have shape {(batch, slots)}, not {tuple(mask.shape)}")


def _slots_needed(geometry: Geometry, position: int, steps: int) -> int:
    """Cells from the first one that the first query may see to the last query's own."""
    if not geometry.causal:
        return geometry.context_grid.cells
    grid, reach = geometry.grid, geometry.extent.s
    frame = grid.h * grid.w
    oldest = 0 if reach is None else max(0, position // frame - reach // 2) * frame
    return position + steps - oldest


def _takes_cpu(query: Tensor, keys: Tensor, values: Tensor, backend: str) -> bool:
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, not {backend!r}")
    if backend == "reference":
        return False
    reason = cpu.why_not(query)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, keys, values)):
        reason = "it gives no gradients of decoding steps, and an input requires them"
    if backend == "cpu" and reason is not None:
        raise ValueError(f"backend 'cpu' cannot run this call: {reason}; use 'auto'")
    return reason is None


@lru_cache(maxsize=_CACHED_STEPS)
def _neighbours(span: _Span, device: torch.device) -> _Neighbours:
    geometry, position, steps, slots = span
    if geometry.sees_everything:
        cells = position + steps if geometry.causal else geometry.context_grid.cells
        index = torch.arange(cells).expand(steps, -1)
        valid = torch.ones(steps, cells, dtype=torch.bool)
        if geometry.causal:
            valid = valid.tril(position)
    else:
        table = key_table(geometry, torch.device("cpu"))
        valid = table.valid[position : position + steps]
        valid = valid[:, : int(valid.sum(1).max())]
        index = table.index[position : position + steps, : valid.shape[1]]
    index = index % slots
    first = int(index[0, 0]) if valid.all() and valid.shape[1] else None
    if first is not None and not torch.equal(
        index, torch.arange(first, first + valid.shape[1]).expand_as(index)
    ):
        first = None
    return _Neighbours(index.to(device), valid.to(device), first)


@lru_cache(maxsize=_CACHED_STEPS)
def _block_table(span: _Span) -> Tensor:
    index, valid, _ = _neighbours(span, torch.device("cpu"))
    row = torch.arange(span.steps).unsqueeze(1).expand_as(index)
    return tiled_table(row[valid], index[valid], span.slots, linear_cells(span.steps))


def _reference(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, span: _Span, scale: float
) -> Tensor:
    slots, valid, first = _neighbours(span, query.device)
    wide = query.dtype if query.dtype == torch.float64 else torch.float32

    def seen(cache: Tensor) -> Tensor:
        """(batch, steps or 1, width, …)"""
        if first is not None:
            return cache[:, None, first : first + slots.shape[1]]  # copies nothing
        return cache[:, slots]

    visible = valid if mask is None else valid & seen(mask)
    scores = torch.einsum("bthd,btkhd->bthk", query.to(wide), seen(keys).to(wide)) * scale
    scores = scores.masked_fill(~visible.unsqueeze(-2), -torch.inf)
    # A row without keys is all NaN after the softmax, and zeros after this.
    weights = scores.softmax(-1).masked_fill(~visible.unsqueeze(-2), 0)
    return torch.einsum("bthk,btkhd->bthd", weights, seen(values).to(wide)).to(query.dtype)
