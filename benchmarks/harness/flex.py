"""FlexAttention, compiled, with a mask function that is exactly the operator's window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.harness.cases import Case, Load
from benchmarks.harness.layouts import STRIP_BLOCK, STRIP_ROWS, Strips
from benchmarks.harness.unavailable import UnavailableError
from megatron_nuwa.grid import Grid

_STRIP_TILES = {
    "BLOCK_M": STRIP_BLOCK,
    "BLOCK_N": STRIP_BLOCK,
    "BLOCK_M1": STRIP_BLOCK // 2,
    "BLOCK_N1": STRIP_BLOCK,
    "BLOCK_M2": STRIP_BLOCK,
    "BLOCK_N2": STRIP_BLOCK // 2,
}
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_call(case: Case, load: Load) -> Call:
    """Tokens in generation order, the default block size."""
    grid, context = case.geometry.grid, case.geometry.context_grid
    return _compiled(_window(case), grid.cells, context.cells, load, {})


def flex_strips_call(case: Case, load: Load) -> Call:
    """Every three rows padded into a block of 64, so that windows touch fewer blocks."""
    grid, context = case.geometry.grid, case.geometry.context_grid
    if not (Strips.fits(grid) and Strips.fits(context)):
        raise UnavailableError(f"needs rows in threes that fit {STRIP_BLOCK} tokens on both sides")
    plain = _window(case)

    def place(index: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        filled = STRIP_ROWS * grid.w
        strip, within = index // STRIP_BLOCK, index % STRIP_BLOCK
        return strip * filled + within, within < filled

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query, query_is_cell = place(query, grid)
        key, key_is_cell = place(key, context)
        return plain(b, h, query, key) & query_is_cell & key_is_cell

    queries, keys = (g.cells // (STRIP_ROWS * g.w) * STRIP_BLOCK for g in (grid, context))
    return _compiled(mask_mod, queries, keys, load, {"BLOCK_SIZE": STRIP_BLOCK})


def _window(case: Case) -> MaskMod:
    grid, context, extent, causal = case.geometry

    def cell(index: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        return index // grid.w % grid.h, index % grid.w, index // (grid.h * grid.w)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query if causal else key >= 0
        for place, side, other, at, width in zip(
            cell(query, grid), grid, context, cell(key, context), extent, strict=True
        ):
            if width is not None:
                centre = place if side == other else place * other // side
                seen = seen & ((at - centre).abs() <= width // 2)
        return seen

    return mask_mod


def _compiled(
    mask_mod: MaskMod, queries: int, keys: int, load: Load, options: dict[str, Any]
) -> Call:
    torch._dynamo.reset()
    block_mask = create_block_mask(mask_mod, None, None, queries, keys, load.device, **options)
    attend = torch.compile(flex_attention, dynamic=False)
    # Its tiles must fit the mask's blocks, which on GPUs it does not see to by itself.
    tiles = _STRIP_TILES if options and load.device.type == "cuda" else None
    return lambda q, k, v: attend(q, k, v, block_mask=block_mask, kernel_options=tiles)
