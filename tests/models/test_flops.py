"""FLOPs by unit."""

from __future__ import annotations

import pytest

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.models.flops import forward_flops, training_flops, unit_flops, unit_names
from megatron_nuwa.models.nuwa import Nuwa, NuwaConfig

TEXT, VIDEO = Grid(1, 1, 7), Grid(4, 4, 3)
TEXT_EXTENT = Extent(1, 1, None)


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


def linear_flops(config: NuwaConfig, tokens: int, context_tokens: int) -> int:
    """Counted from the shapes of the model's own weight matrices."""
    model = Nuwa(config)
    flops = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2 or "positions" in name or name.endswith("codes.weight"):
            continue
        if name == "text_embedding.weight":
            continue
        reads_context = name.startswith("encoder.") or name.endswith(
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
    units = unit_flops(config, TEXT, TEXT_EXTENT, grid)
    assert len(units) == len(unit_names(config))
    assert sum(units) == forward_flops(config, TEXT, TEXT_EXTENT, grid)
    assert 3 * sum(units) == training_flops(config, TEXT, TEXT_EXTENT, grid)
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
    costs = dict(zip(names, unit_flops(config, TEXT, TEXT_EXTENT, VIDEO), strict=True))
    assert costs["encoder_norm"] == 0
    assert costs["head"] == 2 * 32 * 24 * VIDEO.cells
    assert costs["embedding"] == 2 * 32 * 8 * VIDEO.cells
    assert costs["encoder.0"] == costs["encoder.1"] < costs["decoder.0"] == costs["decoder.2"]
