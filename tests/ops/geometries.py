"""Random geometries for the kernels' tests, the definition as a mask, and attention by it."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops.tables import Geometry

CELLS = 400
_widths = st.sampled_from([1, 3, 5, 7, 11, 13, None])


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Odd, prime and 1-wide sides among others; up to four blocks of rows."""
    h = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 13, 17]))
    w = draw(st.sampled_from([w for w in (1, 2, 3, 5, 6, 7, 9, 13, 23, 150) if h * w <= CELLS]))
    s = draw(st.sampled_from([s for s in (1, 2, 3, 4, 5, 10, 29) if h * w * s <= CELLS]))
    return Grid(h, w, s)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any grid, context grid and extent; causal where both grids are equal."""
    grid, causal = draw(grids()), draw(st.booleans())
    context = grid if causal or draw(st.booleans()) else draw(grids())
    return Geometry(grid, context, Extent(draw(_widths), draw(_widths), draw(_widths)), causal)


def definition(geometry: Geometry) -> Tensor:
    """Bool (queries, keys), straight from the definition, with no table."""
    query, key = (
        torch.stack((cells // grid.w % grid.h, cells % grid.w, cells // (grid.h * grid.w)), dim=1)
        for grid in (geometry.grid, geometry.context_grid)
        for cells in (torch.arange(grid.cells),)
    )
    centre = query * torch.tensor(geometry.context_grid) // torch.tensor(geometry.grid)
    far = max(geometry.context_grid)
    reach = torch.tensor([far if width is None else width // 2 for width in geometry.extent])
    near = ((key - centre.unsqueeze(1)).abs() <= reach).all(2)
    if geometry.causal:
        near &= torch.ones_like(near).tril()
    return near


def attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log_sum of (images, tokens, size) by a dense softmax; rows may see nothing."""
    scores = (query @ key.mT * scale).masked_fill(~seen, -torch.inf)
    has_keys = seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~has_keys, 0).softmax(-1) * has_keys
    log_sum = scores.logsumexp(-1).masked_fill(~has_keys.squeeze(-1), torch.inf)
    return weights @ value, log_sum
