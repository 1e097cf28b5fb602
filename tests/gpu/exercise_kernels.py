"""Every CUDA kernel once or twice on awkward shapes; run under compute-sanitizer by its test.

An argument names another library of the kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megatron_nuwa.grid import Grid
from megatron_nuwa.ops import native, nearby_attention

# Several blocks of rows, with rows left over; several chunks of columns; a larger context; so many
# heads that every team of warps has more than one of them.
CALLS = (
    (Grid(5, 7, 5), Grid(5, 7, 5), (5, 7, 3), True, 3),
    (Grid(3, 5, 2), Grid(7, 9, 6), (None, 5, None), False, 3),
    (Grid(7, 9, 4), Grid(1, 3, 1), (3, 3, 1), False, 3),
    (Grid(2, 3, 1), Grid(3, 3, 1), (3, 3, 1), False, 400),
)


def main() -> None:
    """Forward and backward of every dtype and head size, with and without a mask."""
    if len(sys.argv) > 1:
        native.library_path = lambda name: Path(sys.argv[1])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (32, 64, 128):
            for grid, context, extent, causal, heads in CALLS:
                for masked in (False, True):
                    kind = {"device": "cuda", "dtype": dtype, "requires_grad": True}
                    query, key, value = (
                        torch.randn(2, cells, heads, size, **kind)
                        for cells in (grid.cells, context.cells, context.cells)
                    )
                    mask = torch.rand(2, context.cells, device="cuda") < 0.5
                    output = nearby_attention(
                        *(query, key, value),
                        grid=grid,
                        context_grid=context,
                        extent=extent,
                        causal=causal,
                        context_mask=mask if masked else None,
                        backend="cuda",
                    )
                    output.sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
