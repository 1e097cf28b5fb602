"""Multi-head attention over grids, and the four patterns of who sees whom that the paper compares.

A pattern is one class here and one entry of `pattern_of`: it computes the attention, lists the keys
of each query for cached decoding, and counts its pairs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.models.lines import line_attention, line_table
from megatron_nuwa.ops import nearby_attention
from megatron_nuwa.ops.decode import CellLists
from megatron_nuwa.ops.tables import Geometry, key_table

AttentionKind = Literal["nearby", "full", "block_sparse", "axial"]


class Pattern(ABC):
    """Who sees whom, given a geometry; a pattern may overrule the geometry's extent."""

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: Geometry,
        context_mask: Tensor | None,
    ) -> Tensor:
        """(batch, tokens, heads, head_dim) each → like `query`; zeros for one without keys."""

    @abstractmethod
    def lists(self, geometry: Geometry) -> CellLists:
        """What each query takes from a cache while decoding."""

    @abstractmethod
    def pairs(self, geometry: Geometry) -> int:
        """Number of (query, key) pairs that are seen."""


@dataclass(frozen=True)
class Nearby(Pattern):
    """The window of the geometry's extent (paper Eq. 7): O(hws · e_h·e_w·e_s)."""

    def window(self, geometry: Geometry) -> Geometry:
        """The geometry with this pattern's own extent."""
        return geometry

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: Geometry,
        context_mask: Tensor | None,
    ) -> Tensor:
        return nearby_attention(
            query,
            key,
            value,
            grid=geometry.grid,
            context_grid=geometry.context_grid,
            extent=self.window(geometry).extent,
            causal=geometry.causal,
            context_mask=context_mask,
        )

    def lists(self, geometry: Geometry) -> CellLists:
        return CellLists.nearby(self.window(geometry))

    def pairs(self, geometry: Geometry) -> int:
        cells, geometry = geometry.grid.cells, self.window(geometry)
        if geometry.sees_everything:
            if geometry.causal:
                return cells * (cells + 1) // 2
            return cells * geometry.context_grid.cells
        return key_table(geometry, torch.device("cpu")).pairs


@dataclass(frozen=True)
class Full(Nearby):
    """Everything, or everything not later than the query: O((hws)²), by PyTorch's own kernels."""

    def window(self, geometry: Geometry) -> Geometry:
        return geometry._replace(extent=Extent(None, None, None))


class _Lines(Pattern):
    """Patterns whose keys are the lines of some grid through the query."""

    @abstractmethod
    def sides(self, grid: Grid) -> tuple[int, ...]:
        """The axes whose lines are seen, the slowest first."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: Geometry,
        context_mask: Tensor | None,
    ) -> Tensor:
        sides = self._checked_sides(geometry)
        return line_attention(query, key, value, sides, geometry.causal, context_mask)

    def lists(self, geometry: Geometry) -> CellLists:
        cells, sides = geometry.grid.cells, self._checked_sides(geometry)
        table = line_table(sides, cells, geometry.causal, torch.device("cpu"))
        return CellLists(table.neighbours(cells), cells)

    def pairs(self, geometry: Geometry) -> int:
        sides = self._checked_sides(geometry)
        table = line_table(sides, geometry.grid.cells, geometry.causal, torch.device("cpu"))
        return int(table.visible.sum())

    def _checked_sides(self, geometry: Geometry) -> tuple[int, ...]:
        grid, context = geometry.grid, geometry.context_grid
        if grid != context:
            raise ValueError(
                f"context_grid must equal grid for {type(self).__name__} attention; they are "
                f"{tuple(context)} and {tuple(grid)}"
            )
        return self.sides(grid)


@dataclass(frozen=True)
class Axial(_Lines):
    """The row, the column and the frame line through the query: O(hws · (h+w+s)).

    A key shares two coordinates with the query; when causal it also comes no later in generation
    order. One softmax runs over the three lines together.
    """

    def sides(self, grid: Grid) -> tuple[int, ...]:
        return grid.s, grid.h, grid.w


@dataclass(frozen=True)
class BlockSparse(_Lines):
    """Sparse Transformer's fixed blocks over the token sequence, as DALL·E's family used them.

    The sequence in generation order is cut into b blocks of ⌈hws/b⌉ tokens. A query sees its own
    block, and the token at its own place of every other block, through which blocks hear of each
    other; when causal, only what is not later than itself. Each of the b blocks costs (hws/b)²,
    the paper's figure; the links between blocks add hws·b. The paper gives no b: `blocks` None
    takes √hws, the cheapest. A grid that is a single line, such as a text, is one block.
    """

    blocks: int | None = None

    def sides(self, grid: Grid) -> tuple[int, ...]:
        cells = grid.cells
        if cells == max(grid):
            return (cells,)
        blocks = min(self.blocks or round(math.sqrt(cells)), cells)
        return blocks, -(-cells // blocks)


def pattern_of(kind: AttentionKind, blocks: int | None = None) -> Pattern:
    """The pattern with this name; `blocks` is b of block-sparse attention."""
    patterns: dict[AttentionKind, Pattern] = {
        "nearby": Nearby(),
        "full": Full(),
        "block_sparse": BlockSparse(blocks),
        "axial": Axial(),
    }
    return patterns[kind]


class Attention(nn.Module):
    """Multi-head attention with its four projections (paper Eqs. 5–9)."""

    def __init__(self, width: int, heads: int, pattern: Pattern) -> None:
        super().__init__()
        self.heads = heads
        self.pattern = pattern
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor, geometry: Geometry, context_mask: Tensor | None = None
    ) -> Tensor:
        """`x` (batch, tokens, width), `context` (batch, context tokens, width) → like `x`."""
        mixed = self.pattern.attend(
            self.split_heads(self.query(x)),
            self.split_heads(self.key(context)),
            self.split_heads(self.value(context)),
            geometry,
            context_mask,
        )
        return self.output(mixed.flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) → (batch, tokens, heads, head size)."""
        return x.unflatten(-1, (self.heads, -1))
