"""Memory layouts in which peers like their tensors; inputs are packed before the clock starts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.grid import Grid

STRIP_ROWS = 3
STRIP_BLOCK = 64


class TokensFirst:
    """(batch, tokens, heads, size): the operator's own."""

    def pack(self, x: Tensor, grid: Grid) -> Tensor:
        """A contiguous tensor in this layout."""
        return x.clone()

    def unpack(self, x: Tensor, grid: Grid) -> Tensor:
        """Back to (batch, tokens, heads, size)."""
        return x


class HeadsFirst:
    """(batch, heads, tokens, size): that of PyTorch's attention."""

    def pack(self, x: Tensor, grid: Grid) -> Tensor:
        """A contiguous tensor in this layout."""
        return x.transpose(1, 2).contiguous()

    def unpack(self, x: Tensor, grid: Grid) -> Tensor:
        """Back to (batch, tokens, heads, size)."""
        return x.transpose(1, 2)


class Strips:
    """Heads first, with every three rows of a frame padded to a block of 64 tokens."""

    def pack(self, x: Tensor, grid: Grid) -> Tensor:
        """A contiguous tensor in this layout."""
        filled = STRIP_ROWS * grid.w
        strips = x.transpose(1, 2).unflatten(2, (-1, filled))
        return F.pad(strips, (0, 0, 0, STRIP_BLOCK - filled)).flatten(2, 3).contiguous()

    def unpack(self, x: Tensor, grid: Grid) -> Tensor:
        """Back to (batch, tokens, heads, size)."""
        filled = STRIP_ROWS * grid.w
        return x.unflatten(2, (-1, STRIP_BLOCK))[..., :filled, :].flatten(2, 3).transpose(1, 2)

    @staticmethod
    def fits(grid: Grid) -> bool:
        """Whether frames divide into strips that fill one block or less."""
        return grid.h % STRIP_ROWS == 0 and STRIP_ROWS * grid.w <= STRIP_BLOCK


class GridFirst:
    """(batch, frames, rows, columns, heads, size): that of NATTEN; an image has no frame axis."""

    def pack(self, x: Tensor, grid: Grid) -> Tensor:
        """A contiguous tensor in this layout."""
        sides = (grid.h, grid.w) if grid.s == 1 else (grid.s, grid.h, grid.w)
        return x.unflatten(1, sides).contiguous()

    def unpack(self, x: Tensor, grid: Grid) -> Tensor:
        """Back to (batch, tokens, heads, size)."""
        return x.flatten(1, -3)


Layout = TokensFirst | HeadsFirst | Strips | GridFirst
