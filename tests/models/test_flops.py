"""FLOPs by unit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_nuwa.grid import Extent, Grid, nearby_indices
from megatron_nuwa.models.flops import (
    encoding_flops,
    forward_flops,
    training_flops,
    unit_flops,
    unit_names,
)
from megatron_nuwa.models.nuwa import Nuwa, NuwaConfig
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig

TEXT, VIDEO = Grid(1, 1, 7), Grid(4, 4, 3)


def small(**changes: object) -> NuwaConfig:
    sizes = {
        "width": 32,
        "heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "codebook_size": 24,
        "code_dim": 8,
        "text_vocabulary": 50,
        "text_tokens": 7,
        "position_grid": (4, 4, 3),
    }
    return NuwaConfig.model_validate({**sizes, **changes})


def linear_flops(config: NuwaConfig, tokens: int, context_tokens: int, kind: str = "text") -> int:
    """Counted from the shapes of the model's own weight matrices."""
    model = Nuwa(config)
    flops = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2 or "positions" in name or name.endswith("codes.weight"):
            continue
        if name == "text_embedding.weight":
            continue
        if name.startswith("sketch_embedding.") and kind != "sketch":
            continue
        reads_context = name.startswith(("encoder.", "sketch_embedding.")) or name.endswith(
            ("cross_attention.key.weight", "cross_attention.value.weight")
        )
        flops += 2 * parameter.numel() * (context_tokens if reads_context else tokens)
    if config.tie_head:
        flops += 2 * config.width * config.codebook_size * tokens
    return flops


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(tie_head=True),
        small(visual_embedding="direct", feed_forward_ratio=2),
        small(encoder_attention="full", decoder_attention="full"),
        small(decoder_attention="axial"),
        small(decoder_attention="block_sparse", encoder_attention="block_sparse"),
        small(cross_attention="sequential", norm="post"),
    ],
)
@pytest.mark.parametrize("grid", [VIDEO, Grid(4, 4, 1)])
def test_units_sum_to_the_model_and_to_its_matrices(config: NuwaConfig, grid: Grid) -> None:
    units = unit_flops(config, "text", TEXT, grid)
    assert len(units) == len(unit_names(config))
    assert sum(units) == forward_flops(config, "text", TEXT, grid)
    assert 3 * sum(units) == training_flops(config, "text", TEXT, grid)
    scores = sum(units) - linear_flops(config, grid.cells, TEXT.cells)
    # What is left are scores and their sums over values: 4 · width · pairs, at least one a query.
    assert scores > 0
    assert scores % (4 * config.width) == 0
    pairs = scores // (4 * config.width)
    least = config.encoder_layers * TEXT.cells + config.decoder_layers * 2 * grid.cells
    most = config.encoder_layers * TEXT.cells**2 + config.decoder_layers * grid.cells * (
        grid.cells + TEXT.cells
    )
    assert least <= pairs <= most


@pytest.mark.parametrize("embedding", ["codebook", "direct"])
@pytest.mark.parametrize("grid", [VIDEO, Grid(4, 4, 1)])
def test_a_sketch_costs_its_own_cells_and_their_projection(grid: Grid, embedding: str) -> None:
    sizes = {"sketch_codebook_size": 30, "sketch_code_dim": 6, "visual_embedding": embedding}
    config = small(**sizes)
    sketch = forward_flops(config, "sketch", grid, grid)
    assert forward_flops(config, "text", TEXT, grid) == forward_flops(
        small(visual_embedding=embedding), "text", TEXT, grid
    )
    extent = config.visual_extent(grid)
    pairs = 2 * pair_count(grid, extent, False) + 3 * (
        pair_count(grid, extent, True) + pair_count(grid, extent, False)
    )
    linear = linear_flops(config, grid.cells, grid.cells, "sketch")
    assert sketch == linear + 4 * config.width * pairs


def pair_count(grid: Grid, extent: Extent, causal: bool) -> int:
    """By the definition of nearby, cell by cell."""
    return sum(len(nearby_indices(n, grid, grid, extent, causal)) for n in range(grid.cells))


def test_units_are_named_in_the_order_they_run() -> None:
    config = small()
    names = unit_names(config)
    assert names == [
        "embedding",
        "encoder.0",
        "encoder.1",
        "encoder_norm",
        "decoder.0",
        "decoder.1",
        "decoder.2",
        "head",
    ]
    costs = dict(zip(names, unit_flops(config, "text", TEXT, VIDEO), strict=True))
    assert costs["encoder_norm"] == 0
    assert costs["head"] == 2 * 32 * 24 * VIDEO.cells
    assert costs["embedding"] == 2 * 32 * 8 * VIDEO.cells
    assert costs["encoder.0"] == costs["encoder.1"] < costs["decoder.0"] == costs["decoder.2"]


@pytest.mark.parametrize("lookup_dim", [None, 4])
def test_encoding_counts_what_the_encoders_own_layers_do(lookup_dim: int | None) -> None:
    config = VqganConfig(
        image_size=32,
        downsampling=8,
        base_channels=8,
        codebook_size=24,
        code_dim=12,
        lookup_dim=lookup_dim,
    )
    model, counted = Vqgan(config).eval(), []

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        counted.append(2 * out.numel() * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model.encode(torch.zeros(1, 3, 32, 32))
    cells, width = 4 * 4, config.level_channels[-1]
    attention = 2 * 2 * cells * cells * width
    search = 2 * cells * (lookup_dim or 12) * 24
    assert encoding_flops(config) == sum(counted) + attention + search
