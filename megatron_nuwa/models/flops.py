"""FLOPs of the model, counted from its shape: a multiply and an add are two."""

from __future__ import annotations

from functools import lru_cache

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.models.attention import Pattern
from megatron_nuwa.models.layers import cross_pattern
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.ops.tables import Geometry


def forward_flops(
    config: NuwaConfig, context_grid: Grid, context_extent: Extent, grid: Grid
) -> int:
    """FLOPs of one forward pass of one sample; norms, softmax and look-ups are left out."""
    width, inner = config.width, int(config.width * config.feed_forward_ratio)
    tokens, context_tokens = grid.cells, context_grid.cells

    def attention(geometry: Geometry, pattern: Pattern) -> int:
        queries, keys = geometry.grid.cells, geometry.context_grid.cells
        projections = 2 * width * width * 2 * (queries + keys)
        return projections + 4 * width * _pairs(geometry, pattern)

    feed_forward = 2 * 2 * width * inner
    own = Geometry(grid, grid, config.visual_extent(grid), True)
    across = Geometry(grid, context_grid, context_extent, False)
    context = Geometry(context_grid, context_grid, context_extent, False)
    encoder = attention(context, config.encoder_pattern) + feed_forward * context_tokens
    looks_back = config.decoder_pattern
    decoder = (
        attention(own, looks_back)
        + attention(across, cross_pattern(looks_back))
        + feed_forward * tokens
    )
    projection = 2 * config.code_dim * width if config.visual_embedding == "codebook" else 0
    ends = (2 * width * config.codebook_size + projection) * tokens
    return config.encoder_layers * encoder + config.decoder_layers * decoder + ends


def training_flops(
    config: NuwaConfig, context_grid: Grid, context_extent: Extent, grid: Grid
) -> int:
    """FLOPs of forward and backward; recomputed activations are not counted (the MFU habit)."""
    return 3 * forward_flops(config, context_grid, context_extent, grid)


@lru_cache
def _pairs(geometry: Geometry, pattern: Pattern) -> int:
    return pattern.pairs(geometry)
