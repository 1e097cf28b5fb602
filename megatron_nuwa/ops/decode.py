"""Attention of a few cells at a time to cached keys and values: decoding at constant cost a cell.

Who sees whom is a list of cells for each cell. On a CPU the compiled kernel walks the lists; every
other device and dtype goes a static way that reads its position from a tensor on the device, so
that it can be captured in a CUDA graph once and replayed for every cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import cpu
from megatron_nuwa.ops.block_tables import BLOCK_ROWS, ENTRY_BITS, LIST_PADDING
from megatron_nuwa.ops.native import operators
from megatron_nuwa.ops.tables import Geometry, NeighbourTable, key_table

# Elements of a gathered tensor of keys and values; longer blocks go in parts.
_MOST_GATHERED = 1 << 26


class Span(NamedTuple):
    """The cells first … first + steps − 1, where the host knows them."""

    first: int
    steps: int


# Cells to decode: a span, or int64 (steps,) on the device, of which the host need not know more.
Place = Span | Tensor


class CellLists(NamedTuple):
    """Which slots of a cache each cell sees.

    `table` has one row a cell, or a single one that all cells share; None where a cell sees the
    slots up to its own, 0 … n. The cell m lies in slot m mod `slots`.
    """

    table: NeighbourTable | None
    slots: int

    @property
    def are_shared(self) -> bool:
        """Whether one row, of all slots, serves every cell; a grid of one cell has one row, too."""
        if self.table is None or self.table.index.shape != (1, self.slots):
            return False
        return bool(self.table.valid.all())

    @classmethod
    def nearby(cls, geometry: Geometry) -> CellLists:
        """Those of a window: a ring of the frames in reach where causal, else the whole context."""
        if not geometry.causal:
            slots = geometry.context_grid.cells
            if not geometry.sees_everything:
                return cls(key_table(geometry, torch.device("cpu")), slots)
            index = torch.arange(slots).unsqueeze(0)
            return cls(NeighbourTable(index, torch.ones_like(index, dtype=torch.bool)), slots)
        slots = ring_slots(geometry.grid, geometry.extent)
        if geometry.sees_everything:
            return cls(None, slots)
        table = key_table(geometry, torch.device("cpu"))
        return cls(NeighbourTable(table.index % slots, table.valid), slots)


def ring_slots(grid: Grid, extent: Extent) -> int:
    """Cells that causal decoding keeps: the current frame's and those of the ⌊e_s/2⌋ before it."""
    frames = grid.s if extent.s is None else min(grid.s, extent.s // 2 + 1)
    return frames * grid.h * grid.w


class KeyValueCache:
    """Keys and values, both (batch, slots, heads, head_dim), in one tensor."""

    def __init__(self, storage: Tensor) -> None:
        self._storage = storage
        self.keys, self.values = storage.unbind(0)
        self._slots = storage.shape[2]

    @classmethod
    def empty(
        cls, like: Tensor, batch: int, slots: int, heads: int, head_dim: int
    ) -> KeyValueCache:
        """A cache of zeros with dtype and device of `like`."""
        return cls(like.new_zeros(2, batch, slots, heads, head_dim))

    @property
    def both(self) -> Tensor:
        """(2, batch, slots, heads, head_dim): keys, then values."""
        return self._storage

    def write(self, new: Tensor, place: Place) -> None:
        """Store `new` (2, batch, steps, heads, head_dim) in the slots of these cells.

        A span must lie within one frame: the next one takes the place of one still looked at.
        """
        if isinstance(place, Tensor):
            self._storage.index_copy_(2, place % self._slots, new)
            return
        slot = place.first % self._slots
        self._storage[:, :, slot : slot + place.steps] = new


class CellAttention(ABC):
    """Attention of cells to a cache, the same for all layers.

    Queries lie where a fused projection left them: every cell has `parts` vectors, of which the
    one with number `part` is the query.
    """

    def __init__(self, lists: CellLists, mask: Tensor | None, scale: float, parts: int, part: int):
        self._lists, self._scale = lists, scale
        self._parts, self._part = parts, part
        self._mask = mask

    @abstractmethod
    def attend(self, query: Tensor, cache: KeyValueCache, place: Place, out: Tensor) -> None:
        """Write each query's mixture of values into its own place of `out`.

        `query` and `out` are contiguous, (batch, steps · parts, heads, head_dim); a query that
        sees no key gets zeros. With the mask (bool (batch, slots), False = padding) given at the
        start, hidden slots are not seen.
        """


def cell_attention(
    lists: CellLists,
    like: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float,
    parts: int = 1,
    part: int = 0,
    static: bool = False,
) -> CellAttention:
    """The kernel's way where it takes tensors like this one, else (or if asked for) the static."""
    kind = StaticAttention if static or cpu.why_not(like) else KernelAttention
    return kind(lists, mask, scale, parts, part)


def head_dim_of(like: Tensor, head_dim: int, static: bool) -> int:
    """The head size that caches and queries must be padded to with zeros."""
    return head_dim if static or cpu.why_not(like) else -(-head_dim // LIST_PADDING) * LIST_PADDING


class KernelAttention(CellAttention):
    """By the C++ kernel. A cell's result has the same bits alone, in a block and in any batch."""

    def __init__(self, lists: CellLists, mask: Tensor | None, scale: float, parts: int, part: int):
        super().__init__(lists, None if mask is None else mask.contiguous(), scale, parts, part)
        self._forward = operators("cpu").cpu_forward
        self._instructions = cpu.instruction_number()
        self._log_sums: dict[int, Tensor] = {}
        self._latest: tuple[Place | None, Tensor | None] = (None, None)
        if lists.table is not None:
            self._entries, self._counts = _entries(lists.table)
            rows, width = self._entries.shape
            head = torch.tensor([[1, part, -1, -1, -1, 0, width]], dtype=torch.int32)
            self._single = torch.cat(
                [head.expand(rows, -1), self._counts.unsqueeze(1), self._entries], 1
            ).unbind(0)

    def attend(self, query: Tensor, cache: KeyValueCache, place: Place, out: Tensor) -> None:
        assert isinstance(place, Span)
        log_sum = self._log_sums.get(query.numel())
        if log_sum is None:
            batch, rows, heads, _ = query.shape
            log_sum = torch.empty(batch, heads, rows)
            self._log_sums = {query.numel(): log_sum}
        self._forward(
            query,
            cache.keys,
            cache.values,
            self._mask,
            out,
            log_sum,
            self._table(place),
            self._scale,
            self._instructions,
        )

    def _table(self, place: Span) -> Tensor:
        """The packed table of `block_tables` with every cell in a block of its own."""
        latest, table = self._latest
        if table is None or place != latest:
            table = self._built(place)
            self._latest = place, table
        return table

    def _built(self, place: Span) -> Tensor:
        first, steps = place
        if self._lists.table is None:
            width = -(-(first + steps) // LIST_PADDING) * LIST_PADDING
            # Padding must name slots that exist; no row sees it.
            entries = torch.arange(width, dtype=torch.int32).clamp_(max=first) << ENTRY_BITS
            entries = entries.expand(steps, -1)
            counts = torch.arange(first + 1, first + steps + 1, dtype=torch.int32)
            places = torch.arange(width, dtype=torch.int32)
            seen = places < counts.unsqueeze(1)
            entries = torch.where(seen, places << ENTRY_BITS | 1, entries)
        elif steps == 1:
            return self._single[first % len(self._single)]
        else:
            shared = len(self._entries) == 1
            rows = slice(0, 1) if shared else slice(first, first + steps)
            entries = self._entries[rows].expand(steps, -1)
            counts = self._counts[rows].expand(steps)
        width = entries.shape[1]
        blocks = torch.full((steps, BLOCK_ROWS), -1, dtype=torch.int32)
        blocks[:, 0] = torch.arange(steps) * self._parts + self._part
        starts = torch.arange(steps + 1, dtype=torch.int32) * width
        count = torch.tensor([steps], dtype=torch.int32)
        return torch.cat([count, blocks.flatten(), starts, counts, entries.flatten()])


class StaticAttention(CellAttention):
    """By PyTorch's operators, without a question to the device; any device and dtype."""

    def __init__(self, lists: CellLists, mask: Tensor | None, scale: float, parts: int, part: int):
        super().__init__(lists, mask, scale, parts, part)
        self._sees_all = lists.table is None or lists.are_shared
        self._moved: tuple[Tensor, Tensor] | None = None

    def attend(self, query: Tensor, cache: KeyValueCache, place: Place, out: Tensor) -> None:
        queries, outs = (t.unflatten(1, (-1, self._parts))[:, :, self._part] for t in (query, out))
        cells = (
            place
            if isinstance(place, Tensor)
            else torch.arange(place.first, place.first + place.steps, device=query.device)
        )
        if self._sees_all:
            outs.copy_(self._all_slots(queries, cache, cells))
            return
        table = self._lists.table
        assert table is not None
        batch, steps, heads, size = queries.shape
        most = max(1, _MOST_GATHERED // (2 * batch * heads * size * table.width))
        for first in range(0, steps, most):
            part = slice(first, first + most)
            outs[:, part] = self._listed(queries[:, part], cache, cells[part])

    def _table_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._moved is None:
            table = self._lists.table
            assert table is not None
            self._moved = table.index.to(device), table.valid.to(device)
        return self._moved

    def _all_slots(self, query: Tensor, cache: KeyValueCache, cells: Tensor) -> Tensor:
        """Where a cell sees all slots, or all up to its own."""
        visible: Tensor | None = None
        if self._lists.table is None:
            places = torch.arange(cache.keys.shape[1], device=query.device)
            visible = (places <= cells.unsqueeze(1)).view(1, 1, len(cells), -1)
        elif self._mask is not None:
            visible = self._mask.unsqueeze(1).unsqueeze(1)
        return _attention(query, cache.keys, cache.values, visible, self._scale)

    def _listed(self, query: Tensor, cache: KeyValueCache, cells: Tensor) -> Tensor:
        """Where a cell sees its own list: every cell becomes a batch row of one query."""
        batch, steps, _, _ = query.shape
        index, valid = (t.index_select(0, cells) for t in self._table_on(query.device))
        seen = cache.both.index_select(2, index.flatten()).unflatten(2, index.shape)
        keys, values = seen.flatten(1, 2).unbind(0)
        visible = valid.unsqueeze(0).expand(batch, -1, -1)
        if self._mask is not None:
            visible = visible & self._mask.index_select(1, index.flatten()).view_as(visible)
        visible = visible.reshape(batch * steps, 1, 1, -1)
        mixed = _attention(query.flatten(0, 1).unsqueeze(1), keys, values, visible, self._scale)
        return mixed.view_as(query)


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """PyTorch's attention in (batch, tokens, heads, head_dim), zeros for a query without keys."""
    if visible is None:
        allowed = hidden = None
    else:
        hidden = ~visible.any(-1, keepdim=True)
        # A row without keys would be NaN: let it see everything, and then put zeros in its place.
        allowed = visible | hidden
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=allowed,
        scale=scale,
    )
    if hidden is not None:
        mixed = mixed.masked_fill(hidden, 0)
    return mixed.transpose(1, 2)


def _entries(table: NeighbourTable) -> tuple[Tensor, Tensor]:
    """Rows of a table as the kernel's entries, int32 (rows, padded width), and their lengths."""
    missing = -table.width % LIST_PADDING
    counts = table.valid.sum(1)
    # Padding repeats the last neighbour, so that loading it costs nothing.
    last = table.index.gather(1, (counts - 1).clamp(min=0).unsqueeze(1))
    index = F.pad(torch.where(table.valid, table.index, last), (0, missing))
    index[:, table.width :] = last
    entries = index << ENTRY_BITS | F.pad(table.valid, (0, missing))
    return entries.to(torch.int32), counts.to(torch.int32)
