"""The encoder–decoder: causality, size, the settled points, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_nuwa.grid import Extent, Grid, nearby_indices
from megatron_nuwa.models.attention import Nearby
from megatron_nuwa.models.flops import forward_flops
from megatron_nuwa.models.initialisation import Shard
from megatron_nuwa.models.layers import CrossAttention, DecoderLayer, EncoderLayer, NormPosition
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig
from megatron_nuwa.ops.tables import Geometry

SMALL = {
    "width": 32,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "codebook_size": 50,
    "code_dim": 8,
    "text_vocabulary": 40,
    "position_grid": (5, 4, 3),
}


def small(**changes: object) -> NuwaConfig:
    return NuwaConfig(**{**SMALL, **changes})


def text_context(batch: int = 2, words: int = 5) -> Context:
    mask = torch.arange(77).expand(batch, 77) < words
    return Context("text", torch.randint(0, 40, (batch, 77)), Grid(1, 1, 77), mask)


def test_paper_recipe_counts_870_million() -> None:
    with torch.device("meta"):
        counts = Nuwa(NuwaConfig()).parameter_counts()
    assert counts["transformer"] == pytest.approx(870e6, rel=0.01)
    assert counts["text_table"] == 49_408 * 1_280
    assert counts["head"] == 12_288 * 1_280
    assert counts["total"] == sum(counts[part] for part in ("transformer", "text_table", "head"))


def test_the_other_reading_of_870_million_is_expressible() -> None:
    """24 + 24 layers, 2× feed-forwards, embedding tied to the head: 866 M with the text table."""
    config = NuwaConfig(
        encoder_layers=24, feed_forward_ratio=2, visual_embedding="direct", tie_head=True
    )
    with torch.device("meta"):
        counts = Nuwa(config).parameter_counts()
    assert counts["head"] == 0
    assert counts["total"] == pytest.approx(866e6, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "post"},
        {"cross_attention": "sequential"},
        {"norm": "post", "cross_attention": "sequential"},
        {"visual_embedding": "direct", "tie_head": True},
        {"tie_head": True},
        {"extent_reading": "radius"},
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [Grid(5, 4, 1), Grid(4, 4, 3)])
def test_a_cell_sees_only_tokens_before_it(changes: dict[str, object], grid: Grid) -> None:
    torch.manual_seed(0)
    model = Nuwa(small(**changes)).double().eval()
    context = text_context()
    target = torch.randint(0, 50, (2, grid.cells))
    logits = model(context, target, grid)
    assert logits.shape == (2, grid.cells, 50)
    for n in range(grid.cells):
        changed = target.clone()
        changed[:, n] = (changed[:, n] + 1) % 50
        moved = (model(context, changed, grid) - logits).abs().amax((0, 2)) > 1e-12
        assert not moved[: n + 1].any()
        if n + 1 < grid.cells:
            assert moved[n + 1]


def test_padding_of_the_context_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Nuwa(small()).eval()
    context = text_context(words=5)
    tokens = context.tokens.clone()
    tokens[:, 5:] = 7
    target = torch.randint(0, 50, (2, 20))
    other = Context("text", tokens, context.grid, context.mask)
    assert torch.equal(model(context, target, Grid(5, 4, 1)), model(other, target, Grid(5, 4, 1)))


def test_visual_context_and_its_words_matter() -> None:
    torch.manual_seed(0)
    model = Nuwa(small()).eval()
    target = torch.randint(0, 50, (1, 48))
    sketch = torch.randint(0, 50, (1, 16))
    logits = [
        model(Context("visual", tokens, Grid(4, 4, 1)), target, Grid(4, 4, 3))
        for tokens in (sketch, (sketch + 1) % 50)
    ]
    assert not torch.allclose(*logits)


def test_a_model_that_reads_sketches_is_the_one_that_does_not_with_a_table_more() -> None:
    """Names, their order, shapes and every starting weight."""
    torch.manual_seed(0)
    without, reading = Nuwa(small()), Nuwa(small(sketch_codebook_size=30, sketch_code_dim=6))
    for model in (without, reading):
        model.initialise(7)
    more = {"sketch_embedding.codes.weight": (30, 6), "sketch_embedding.projection.weight": (32, 6)}
    weights = reading.state_dict()
    assert {name: tuple(weights.pop(name).shape) for name in more} == more
    assert list(weights) == list(without.state_dict())
    for name, weight in without.state_dict().items():
        assert torch.equal(weights[name], weight), name
    before, now = without.parameter_counts(), reading.parameter_counts()
    assert now == before | {"sketch_embedding": 30 * 6 + 6 * 32, "total": sum(now.values()) // 2}
    assert set(before) == {"transformer", "text_table", "head", "total"}
    # What runs of models without sketches have written of themselves stays comparable.
    told, more_told = small().description(), small(sketch_codebook_size=30).description()
    assert not any("sketch" in field for field in told)
    assert more_told == told | {"sketch_codebook_size": 30, "sketch_code_dim": 256}
    assert NuwaConfig.model_validate(told) == small()


def test_starting_weights_are_as_wide_as_asked_and_a_trained_model_does_not_remember() -> None:
    narrow, wide = Nuwa(small()), Nuwa(small(initial_deviation=0.06))
    for model in (narrow, wide):
        model.initialise(7)
    weights = wide.state_dict()
    for name, weight in narrow.state_dict().items():
        factor = 1 if "norm" in name or name.endswith("bias") else 3
        torch.testing.assert_close(weights[name], factor * weight)
    assert wide.config.description() == narrow.config.description()


@pytest.mark.parametrize("changes", [{}, {"visual_embedding": "direct", "tie_head": True}], ids=str)
def test_a_sketch_is_read_from_a_table_of_its_own(changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Nuwa(small(sketch_codebook_size=30, sketch_code_dim=6, **changes)).eval()
    target, tokens = torch.randint(0, 50, (1, 48)), torch.randint(0, 30, (1, 48))
    grid = Grid(4, 4, 3)
    sketch = Context("sketch", tokens, grid)
    logits = model(sketch, target, grid)
    assert logits.shape == (1, 48, 50)
    assert not torch.allclose(logits, model(Context("visual", tokens, grid), target, grid))
    own, across = model.decoder_geometries(grid, sketch)
    assert across.extent == own.extent == model.config.visual_extent(grid)
    assert not across.causal
    logits.sum().backward()
    assert model.sketch_embedding is not None
    assert model.sketch_embedding.codes.weight.grad is not None
    assert model.sketch_embedding.codes.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(model(sketch, target, grid), logits)
    with pytest.raises(ValueError, match=r"model\.sketch_codebook_size is null"):
        Nuwa(small())(sketch, target, grid)


def test_codebook_of_the_tokenizer_becomes_the_embedding() -> None:
    model = Nuwa(small())
    codebook = torch.randn(50, 8)
    model.use_codebook(codebook)
    assert torch.equal(model.visual_embedding.codes.weight, codebook)
    with pytest.raises(ValueError, match="codebook must be"):
        model.use_codebook(torch.randn(49, 8))
    with pytest.raises(ValueError, match=r"model\.sketch_codebook_size is null"):
        model.use_sketch_codebook(codebook)
    reading = Nuwa(small(sketch_codebook_size=50, sketch_code_dim=8))
    reading.use_sketch_codebook(codebook)
    assert reading.sketch_embedding is not None
    assert torch.equal(reading.sketch_embedding.codes.weight, codebook)
    with pytest.raises(ValueError, match=r"sketch codebook must be \(50, 8\)"):
        reading.use_sketch_codebook(codebook.T)


def test_counted_flops_are_the_linear_layers_and_the_visible_pairs() -> None:
    """Against PyTorch's own counter, which sees every matrix product but no window."""
    config = small()
    model, grid, text = Nuwa(config).eval(), Grid(5, 4, 3), Grid(1, 1, 77)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(text_context(batch=1), torch.randint(0, 50, (1, grid.cells)), grid)
    operators = counter.get_flop_counts()["Global"].items()
    linear = sum(flops for name, flops in operators if str(name) in ("aten.addmm", "aten.mm"))
    nearby = sum(
        len(nearby_indices(n, grid, grid, Extent(3, 3, 3), True)) for n in range(grid.cells)
    )
    pairs = config.encoder_layers * 77 * 77 + config.decoder_layers * (nearby + grid.cells * 77)
    # The first cell's input is `<bos>`, so one token fewer passes the codebook's projection.
    linear += 2 * config.code_dim * config.width
    assert forward_flops(config, "text", text, grid) == linear + 4 * config.width * pairs


def test_errors_name_the_field() -> None:
    with pytest.raises(ValidationError, match=r"model\.width"):
        small(heads=5)
    with pytest.raises(ValidationError, match="odd"):
        small(video_extent=(2, 3, 3))
    with pytest.raises(ValueError, match="larger than the model's positions"):
        Nuwa(small())(text_context(), torch.zeros(2, 48, dtype=torch.long), Grid(6, 4, 2))


def test_images_clips_and_texts_have_windows_of_their_own() -> None:
    config = NuwaConfig(
        image_extent=(5, 7, 1),
        video_extent=(3, 1, 5),
        text_extent=(1, 1, 9),
        position_grid=(8, 8, 4),
    )
    image, clip = Grid(8, 8, 1), Grid(8, 8, 4)
    assert config.visual_extent(image) == Extent(5, 7, 1)
    assert config.visual_extent(clip) == Extent(3, 1, 5)
    assert config.context_extent("text", config.text_grid) == Extent(1, 1, 9)
    # Sketches and pictures that are read have that of what is written.
    for kind in ("sketch", "visual"):
        assert config.context_extent(kind, image) == Extent(5, 7, 1)
        assert config.context_extent(kind, clip) == Extent(3, 1, 5)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("cross", ["parallel", "sequential"])
def test_dropout_takes_every_branch_and_never_the_residual(
    norm: NormPosition, cross: CrossAttention
) -> None:
    grid = Grid(2, 2, 1)
    geometry = Geometry(grid, grid, Extent(3, 3, 1), False)
    x, context = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    encoder = EncoderLayer(8, 2, 16, 1.0, norm, Nearby())
    decoder = DecoderLayer(8, 2, 16, 1.0, norm, cross, Nearby())
    found = encoder(x, geometry, None), decoder(x, context, geometry, geometry, None)
    for layer, y in zip((encoder, decoder), found, strict=True):
        norms = [layer.attention_norm, getattr(layer, "cross_norm", None), layer.feed_forward_norm]
        expected = x
        for each in norms if norm == "post" else ():
            expected = expected if each is None else each(expected)
        torch.testing.assert_close(y, expected)
    for layer in (encoder, decoder):
        layer.eval()
    assert not encoder(x, geometry, None).allclose(found[0])
    assert not decoder(x, context, geometry, geometry, None).allclose(found[1])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_a_weight_are_equally_long_and_hold_it_and_zeros(count: int, dim: int) -> None:
    whole = torch.arange(1.0, 31).view(5, 6)
    shards = [Shard(dim, index, count, whole.shape[dim]) for index in range(count)]
    parts = [shard.of(whole) for shard in shards]
    assert {part.shape[dim] for part in parts} == {shards[0].length}
    joined = torch.cat(parts, dim)
    assert joined.narrow(dim, 0, whole.shape[dim]).equal(whole)
    assert joined.sum() == whole.sum()


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("cross", ["parallel", "sequential"])
def test_layers_are_the_formulas_that_they_say(norm: NormPosition, cross: CrossAttention) -> None:
    grid = Grid(2, 2, 1)
    own = Geometry(grid, grid, Extent(3, 3, 1), True)
    across = own._replace(causal=False)
    x, context = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    layer = DecoderLayer(8, 2, 16, 0.0, norm, cross, Nearby())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)

    def both(h: Tensor) -> Tensor:
        return back(h) + there(h)

    def back(h: Tensor) -> Tensor:
        return layer.self_attention(h, h, own)

    def there(h: Tensor) -> Tensor:
        return layer.cross_attention(h, context, across)

    branches = [(both, layer.attention_norm)]
    if cross == "sequential":
        assert layer.cross_norm is not None
        branches = [(back, layer.attention_norm), (there, layer.cross_norm)]
    expected = x
    for branch, its_norm in (*branches, (layer.feed_forward, layer.feed_forward_norm)):
        if norm == "pre":
            expected = expected + branch(its_norm(expected))
        else:
            expected = its_norm(expected + branch(expected))
    torch.testing.assert_close(layer(x, context, own, across, None), expected)
