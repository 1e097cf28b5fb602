"""Every CUDA kernel once or twice on awkward shapes; run under compute-sanitizer by its test."""

from __future__ import annotations

import torch

from megatron_nuwa.grid import Grid
from megatron_nuwa.ops import nearby_attention

# Several blocks of rows, with rows left over; several chunks of columns; a larger context.
CALLS = (
    (Grid(5, 7, 5), Grid(5, 7, 5), (5, 7, 3), True),
    (Grid(3, 5, 2), Grid(7, 9, 6), (None, 5, None), False),
    (Grid(7, 9, 4), Grid(1, 3, 1), (3, 3, 1), False),
)


def main() -> None:
    """Forward and backward of every dtype and head size, with and without a mask."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (32, 64, 128):
            for grid, context, extent, causal in CALLS:
                for masked in (False, True):
                    query, key, value = (
                        torch.randn(2, cells, 3, size, device="cuda", dtype=dtype).requires_grad_()
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
