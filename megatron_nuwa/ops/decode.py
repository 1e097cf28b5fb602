"""Attention of a few cells at a time to cached keys and values: decoding at constant cost a cell.

Who sees whom is a list of cells for each cell. On a CPU the compiled kernel walks the lists; every
other device and dtype goes a static way that reads its position from a tensor on the device, so
that it can be captured in a CUDA graph once and replayed for every cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import cpu
from megatron_nuwa.ops.block_tables import BLOCK_ROWS, ENTRY_BITS, LIST_PADDING
from megatron_nuwa.ops.native import operators
from megatron_nuwa.ops.tables import Geometry, NeighbourTable, key_table

# Elements of a gathered tensor of keys and values; longer blocks go in parts.
_MOST_GATHERED = 1 << 26
_SAME_IN_ANY_BATCH = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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

    def slots_of(self, place: Place) -> Place:
        """Where these cells, all of one frame, lie in the cache."""
        if isinstance(place, Tensor):
            return place % self.slots
        return Span(place.first % self.slots, place.steps)

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

    def write(self, new: Tensor, slots: Place) -> None:
        """Store `new` (2, batch, steps, heads, head_dim) in these slots; see `CellLists.slots_of`.

        The cells must lie within one frame: the next one takes the place of one still looked at.
        """
        if isinstance(slots, Tensor):
            self._storage.index_copy_(2, slots, new)
        else:
            self._storage[:, :, slots.first : slots.first + slots.steps] = new


class CellAttention(ABC):
    """Attention of cells to a cache, the same for all layers.

    Queries lie where a fused projection left them: every cell has `parts` vectors, of which the
    one with number `part` is the query. `mask` bool (batch, slots), False = padding, hides slots.
    """

    def __init__(self, lists: CellLists, mask: Tensor | None, scale: float, parts: int, part: int):
        self._lists, self._scale = lists, scale
        self._parts, self._part = parts, part
        self._mask = None if mask is None else mask.contiguous()

    @abstractmethod
    def go_to(self, place: Place) -> None:
        """Have the calls that follow look from these cells: once a step, for all layers."""

    @abstractmethod
    def attend(self, query: Tensor, cache: KeyValueCache, out: Tensor) -> None:
        """Write each query's mixture of values into its own place of `out`.

        `query` and `out` are contiguous, (batch, steps · parts, heads, head_dim); a query that
        sees no key gets zeros.
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
    if static or cpu.why_not(like):
        return StaticAttention(lists, mask, scale, parts, part)
    return KernelAttention(lists, mask, scale, parts, part)


def head_dim_of(like: Tensor, head_dim: int, static: bool) -> int:
    """The head size that caches and queries must be padded to with zeros."""
    return head_dim if static or cpu.why_not(like) else -(-head_dim // LIST_PADDING) * LIST_PADDING


class KernelAttention(CellAttention):
    """By the C++ kernel. A cell's result has the same bits alone, in a block and in any batch."""

    def __init__(self, lists: CellLists, mask: Tensor | None, scale: float, parts: int, part: int):
        super().__init__(lists, mask, scale, parts, part)
        self._forward = operators("cpu").cpu_forward
        self._instructions = cpu.instruction_number()
        self._log_sum = torch.empty(0)
        if lists.table is not None:
            self._entries, self._counts = _entries(lists.table)
            rows, width = self._entries.shape
            head = torch.tensor([[1, part, -1, -1, -1, 0, width]], dtype=torch.int32)
            self._single = torch.cat(
                [head.expand(rows, -1), self._counts.unsqueeze(1), self._entries], 1
            ).unbind(0)

    def go_to(self, place: Place) -> None:
        """Have the packed table of `block_tables` at hand, every cell in a block of its own."""
        assert isinstance(place, Span)
        first, steps = place
        if self._lists.table is None:
            self._table = self._packed(*_entries_up_to(first, steps))
        elif steps == 1:
            self._table = self._single[first % len(self._single)]
        else:
            shared = len(self._entries) == 1
            rows = slice(0, 1) if shared else slice(first, first + steps)
            entries = self._entries[rows].expand(steps, -1)
            self._table = self._packed(entries, self._counts[rows].expand(steps))

    def attend(self, query: Tensor, cache: KeyValueCache, out: Tensor) -> None:
        batch, rows, heads, _ = query.shape
        if self._log_sum.numel() != batch * rows * heads:
            self._log_sum = torch.empty(batch, heads, rows)
        self._forward(
            query,
            cache.keys,
            cache.values,
            self._mask,
            out,
            self._log_sum,
            self._table,
            self._scale,
            self._instructions,
        )

    def _packed(self, entries: Tensor, counts: Tensor) -> Tensor:
        steps, width = entries.shape
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
        self._table: NeighbourTable | None = None
        if lists.table is not None and not self._sees_all:
            missing = -lists.table.width % LIST_PADDING
            self._table = NeighbourTable(*(F.pad(t, (0, missing)) for t in lists.table))
        self._may_see_nothing = self._asked_whether_blind()

    def go_to(self, place: Place) -> None:
        self._index: Tensor | None = None
        self._bias: Tensor | None = None
        self._blind: Tensor | None = None
        cells = place if isinstance(place, Tensor) else torch.arange(*_ends(place))
        if self._table is not None:
            self._table = self._table.to(cells.device)
            index, visible = (t.index_select(0, cells) for t in self._table)
            self._index, visible = index, visible.unsqueeze(0)
            if self._mask is not None:
                seen = self._mask.index_select(1, index.flatten())
                visible = visible & seen.unflatten(1, index.shape)
        elif self._lists.table is None:
            slots = torch.arange(self._lists.slots, device=cells.device)
            visible = (slots <= cells.unsqueeze(1)).unsqueeze(0)
        elif self._mask is not None:
            visible = self._mask.unsqueeze(1)
        else:
            return
        if self._may_see_nothing:
            # A row without keys would be NaN: let it see everything, and zeros take its place.
            self._blind = ~visible.any(-1, keepdim=True)
            visible = visible | self._blind
        self._bias = torch.zeros(visible.shape, device=visible.device)
        self._bias = self._bias.masked_fill_(~visible, -torch.inf)

    def attend(self, query: Tensor, cache: KeyValueCache, out: Tensor) -> None:
        queries, outs = (t.unflatten(1, (-1, self._parts))[:, :, self._part] for t in (query, out))
        if self._bias is not None and self._bias.dtype != query.dtype:
            self._bias = self._bias.to(query.dtype)
        if self._index is None:
            bias = None if self._bias is None else self._bias.unsqueeze(1)
            mixed = _attention(queries, cache.keys, cache.values, bias, self._scale)
        else:
            mixed = self._listed(queries, cache, self._index)
        if self._blind is not None:
            mixed = mixed.masked_fill(self._blind.unsqueeze(-1), 0)
        outs.copy_(mixed)

    def _listed(self, query: Tensor, cache: KeyValueCache, index: Tensor) -> Tensor:
        """Where every cell sees its own list, and so becomes a batch row of one query."""
        assert self._bias is not None
        batch, steps, heads, size = query.shape
        bias = self._bias.expand(batch, -1, -1)
        most = max(1, _MOST_GATHERED // (2 * batch * heads * size * index.shape[1]))
        outputs = []
        for first in range(0, steps, most):
            part = slice(first, first + most)
            here = index[part]
            seen = cache.both.index_select(2, here.flatten()).unflatten(2, here.shape)
            keys, values = seen.flatten(1, 2).unbind(0)
            rows = query[:, part].flatten(0, 1).unsqueeze(1)
            hidden = bias[:, part].flatten(0, 1).unsqueeze(1).unsqueeze(1)
            mixed = _attention(rows, keys, values, hidden, self._scale)
            outputs.append(mixed.view(batch, -1, heads, size))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _asked_whether_blind(self) -> bool:
        """Whether some query may see no key; asks the device, once."""
        if self._mask is None:
            table = self._lists.table
            return table is not None and not bool(table.valid.any(1).all())
        if self._sees_all:
            return not bool(self._mask.any(1).all())
        return True


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """PyTorch's attention, in (batch, tokens, heads, head_dim)."""
    # Other kernels choose how to cut the work by the size of the batch, and with it the bits.
    backends = sdpa_kernel(_SAME_IN_ANY_BATCH) if query.is_cuda else nullcontext()
    with backends:
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=bias,
            scale=scale,
        )
    return mixed.transpose(1, 2)


def _ends(place: Span) -> tuple[int, int]:
    return place.first, place.first + place.steps


def _entries_up_to(first: int, steps: int) -> tuple[Tensor, Tensor]:
    """The kernel's entries of cells that see all slots up to their own, and their numbers."""
    width = -(-(first + steps) // LIST_PADDING) * LIST_PADDING
    slots = torch.arange(width, dtype=torch.int32)
    counts = torch.arange(first + 1, first + steps + 1, dtype=torch.int32)
    seen = slots < counts.unsqueeze(1)
    # Padding must name slots that exist; no row sees it.
    return torch.where(seen, slots << ENTRY_BITS | 1, slots.clamp(max=first) << ENTRY_BITS), counts


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
