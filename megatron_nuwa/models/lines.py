"""Attention along the lines of a grid: every cell sees the cells that share all axes but one.

Axial attention is this over (frames, rows, columns), block-sparse attention over (blocks, places
in a block). A query's lines cross at the query itself, and all of them go through ONE softmax in
which that cell counts once: the same rule as for a window, so that attentions differ in who sees
whom and in nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.ops.tables import NeighbourTable, table_of_pairs


@dataclass(frozen=True)
class LineTable:
    """Who sees whom along the lines; one row a place of the grid, one column a place of a line.

    `index` int64 (places, Σ sides): what stands there; `visible` bool of the same shape: whether
    the row's cell sees it.
    """

    index: Tensor
    visible: Tensor

    def neighbours(self, cells: int) -> NeighbourTable:
        """The cells that each of the first `cells` sees, in ascending order."""
        row = self.visible.nonzero()[:, 0]
        neighbour = self.index[self.visible]
        order = torch.argsort(row * len(self.index) + neighbour)
        return table_of_pairs(row[order], neighbour[order], cells)


@lru_cache(maxsize=64)
def line_table(sides: tuple[int, ...], cells: int, causal: bool, device: torch.device) -> LineTable:
    """The table of a grid with these sides whose first `cells` places, in raster order, exist."""
    places = torch.arange(math.prod(sides)).view(sides)
    indices, visibles = [], []
    for axis, side in enumerate(sides):
        line = places.movedim(axis, -1).unsqueeze(-2)
        index = line.expand(*line.shape[:-2], side, side).movedim(-2, axis).reshape(-1, side)
        own = index == torch.arange(len(index)).unsqueeze(1)
        indices.append(index)
        # The lines cross at the query: the first line keeps it, the others leave it out.
        visibles.append(torch.ones_like(own) if axis == 0 else ~own)
    index, visible = torch.cat(indices, 1), torch.cat(visibles, 1)
    row = torch.arange(len(index)).unsqueeze(1)
    visible &= (index < cells) & (row < cells)
    if causal:
        visible &= index <= row
    return LineTable(index.to(device), visible.to(device))


def line_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sides: tuple[int, ...],
    causal: bool,
    context_mask: Tensor | None = None,
) -> Tensor:
    """Attention over the lines of a grid: O(tokens · Σ sides) work and memory.

    Args:
        query, key, value: (batch, tokens, heads, head_dim) in raster order of `sides`, whose
            product may be larger than tokens; places past the last token do not exist.
        sides: length of each axis, the slowest first.
        causal: a query sees no cell that comes after it.
        context_mask: bool (batch, tokens), False = padding.

    Returns:
        Like `query`; zeros for a query that sees no key.
    """
    cells, size = query.shape[1], query.shape[3]
    missing = math.prod(sides) - cells
    table = line_table(sides, cells, causal, query.device)
    visible = table.visible.unsqueeze(0)
    if context_mask is not None:
        visible = visible & F.pad(context_mask, (0, missing))[:, table.index]
    has_keys = visible.any(-1, keepdim=True)
    # A row without keys would be NaN: let it see everything, and then put zeros in its place.
    allowed = (visible | ~has_keys).unsqueeze(1)

    grids = [
        F.pad(t, (0, 0, 0, 0, 0, missing)).transpose(1, 2).unflatten(2, sides)
        for t in (query, key, value)
    ]
    axes = range(2, 2 + len(sides))
    lines = [[grid.movedim(axis, -2) for grid in grids] for axis in axes]
    scores = torch.cat(
        [
            (q @ k.transpose(-1, -2)).movedim(-2, axis).flatten(2, -2)
            for axis, (q, k, _) in zip(axes, lines, strict=True)
        ],
        dim=-1,
    )
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = (scores.to(wide) * size**-0.5).masked_fill(~allowed, -torch.inf)
    probabilities = scores.softmax(-1).to(value.dtype).split(sides, dim=-1)
    output = sum(
        (p.unflatten(2, sides).movedim(axis, -2) @ v).movedim(-2, axis).flatten(2, -2)
        for axis, p, (_, _, v) in zip(axes, probabilities, lines, strict=True)
    )
    assert isinstance(output, Tensor)
    output = output.transpose(1, 2).masked_fill(~has_keys.unsqueeze(-1), 0)
    return output[:, :cells].to(query.dtype)
