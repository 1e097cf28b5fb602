"""FLOPs of the model, counted from its shape: a multiply and an add are two."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_nuwa.grid import Grid
from megatron_nuwa.models.attention import Pattern
from megatron_nuwa.models.layers import cross_pattern
from megatron_nuwa.models.nuwa import ContextKind, NuwaConfig
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig
from megatron_nuwa.ops.tables import Geometry


def unit_names(config: NuwaConfig) -> list[str]:
    """Names of the model's units in the order they run; a pipeline is cut between any two."""
    encoder = [f"encoder.{layer}" for layer in range(config.encoder_layers)]
    decoder = [f"decoder.{layer}" for layer in range(config.decoder_layers)]
    return ["embedding", *encoder, "encoder_norm", *decoder, "head"]


def unit_flops(config: NuwaConfig, kind: ContextKind, context_grid: Grid, grid: Grid) -> list[int]:
    """FLOPs of one forward pass of one sample, a unit of `unit_names` each.

    `kind` and `context_grid` are those of what the encoder reads, `grid` is the target's.
    Norms, softmax and look-ups are left out, so `encoder_norm` is 0. A tied head's table is
    computed once a micro-batch, not once a sample, and left out too.
    """
    width, inner = config.width, int(config.width * config.feed_forward_ratio)
    tokens, context_tokens = grid.cells, context_grid.cells
    context_extent = config.context_extent(kind, context_grid)

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
    looked_up = {"text": 0, "visual": config.code_dim, "sketch": config.sketch_code_dim}[kind]
    projected = config.code_dim * tokens + looked_up * context_tokens
    return [
        2 * width * projected if config.visual_embedding == "codebook" else 0,
        *[encoder] * config.encoder_layers,
        0,
        *[decoder] * config.decoder_layers,
        2 * width * config.codebook_size * tokens,
    ]


def forward_flops(config: NuwaConfig, kind: ContextKind, context_grid: Grid, grid: Grid) -> int:
    """FLOPs of one forward pass of one sample; norms, softmax and look-ups are left out."""
    return sum(unit_flops(config, kind, context_grid, grid))


def training_flops(config: NuwaConfig, kind: ContextKind, context_grid: Grid, grid: Grid) -> int:
    """FLOPs of forward and backward; recomputed activations are not counted (the MFU habit)."""
    return 3 * forward_flops(config, kind, context_grid, grid)


def encoding_flops(config: VqganConfig) -> int:
    """FLOPs of one image's way to its tokens, the search for the nearest codes included.

    Convolutions, projections and products are counted; norms, activations and additions are not.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        vqgan = Vqgan(config)
        vqgan.encoder(torch.empty(1, config.image_channels, config.image_size, config.image_size))
    dim = config.lookup_dim or config.code_dim
    projection = config.code_dim * dim if config.lookup_dim else 0
    search = 2 * config.grid_side**2 * (projection + dim * config.codebook_size)
    return int(counter.get_total_flops()) + search


@lru_cache
def _pairs(geometry: Geometry, pattern: Pattern) -> int:
    return pattern.pairs(geometry)
