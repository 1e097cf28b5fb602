"""The attentions of the paper's ablation, each against its definition of who sees whom."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LargestTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid, is_nearby
from megatron_nuwa.models.attention import Attention, AttentionKind, Pattern, pattern_of
from megatron_nuwa.models.flops import forward_flops
from megatron_nuwa.models.layers import DecoderLayer
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig
from megatron_nuwa.ops.tables import Geometry

KINDS: tuple[AttentionKind, ...] = ("nearby", "full", "block_sparse", "axial")
CPU = torch.device("cpu")


def sees(n: int, m: int, kind: AttentionKind, geometry: Geometry, blocks: int | None) -> bool:
    """The definition of each attention, for one query and one key."""
    grid, context_grid, extent, causal = geometry
    if causal and m > n:
        return False
    if kind == "full":
        return True
    if kind == "nearby":
        query, key = grid.cell(n), context_grid.cell(m)
        return is_nearby(query, key, grid, context_grid, extent, causal)
    if kind == "axial":
        shared = sum(a == b for a, b in zip(grid.cell(n), grid.cell(m), strict=True))
        return shared >= 2
    if sorted(grid)[:2] == [1, 1]:
        return True
    count = min(blocks or round(math.sqrt(grid.cells)), grid.cells)
    length = math.ceil(grid.cells / count)
    return n // length == m // length or n % length == m % length


def visible_keys(kind: AttentionKind, geometry: Geometry, blocks: int | None) -> list[list[int]]:
    return [
        [m for m in range(geometry.context_grid.cells) if sees(n, m, kind, geometry, blocks)]
        for n in range(geometry.grid.cells)
    ]


def pair_count(kind: AttentionKind, geometry: Geometry, blocks: int | None = 4) -> int:
    return sum(map(len, visible_keys(kind, geometry, blocks)))


def brute_force(
    query: Tensor, key: Tensor, value: Tensor, keys: list[list[int]], mask: Tensor | None
) -> Tensor:
    """One softmax a query over the keys that it sees; differentiable."""
    rows = []
    for n, seen in enumerate(keys):
        samples = []
        for b in range(query.shape[0]):
            kept = [m for m in seen if mask is None or bool(mask[b, m])]
            if not kept:
                samples.append((query[b, n] + key[b, 0] + value[b, 0]) * 0)
                continue
            scores = torch.einsum("hd,mhd->hm", query[b, n], key[b, kept]) / query.shape[-1] ** 0.5
            samples.append(torch.einsum("hm,mhd->hd", scores.softmax(-1), value[b, kept]))
        rows.append(torch.stack(samples))
    return torch.stack(rows, 1)


def listed(pattern: Pattern, geometry: Geometry) -> list[list[int]]:
    """The cells that decoding lists for each query, in a cache of all of them."""
    cells, lists = geometry.grid.cells, pattern.lists(geometry)
    if lists.table is None:
        return [list(range(n + 1)) for n in range(cells)]
    index, valid = (t.expand(cells, -1) for t in (lists.table.index, lists.table.valid))
    frame = geometry.grid.h * geometry.grid.w
    result = []
    for n in range(cells):
        seen = index[n][valid[n]]
        if lists.slots < geometry.context_grid.cells:
            # A ring: the newest cell in a slot that is not of a later frame.
            end = (n // frame + 1) * frame
            seen = end - 1 - (end - 1 - seen) % lists.slots
        result.append(sorted(seen.tolist()))
    return result


sides = st.integers(1, 5)
grids = st.builds(Grid, sides, sides, st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(
    grid=grids,
    kind=st.sampled_from(KINDS),
    causal=st.booleans(),
    blocks=st.one_of(st.none(), st.integers(1, 12)),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_outputs_and_gradients_equal_brute_force(
    grid: Grid, kind: AttentionKind, causal: bool, blocks: int | None, masked: bool, seed: int
) -> None:
    geometry = Geometry(grid, grid, Extent(3, 1, 3), causal)
    generator = torch.Generator().manual_seed(seed)
    query, key, value, grad = torch.randn(
        4, 2, grid.cells, 2, 4, generator=generator, dtype=torch.float64
    )
    inputs = [t.requires_grad_() for t in (query, key, value)]
    mask = torch.rand(2, grid.cells, generator=generator) < 0.4 if masked else None
    keys, pattern = visible_keys(kind, geometry, blocks), pattern_of(kind, blocks)

    expected = brute_force(query, key, value, keys, mask)
    output = pattern.attend(query, key, value, geometry, mask)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        rtol=1e-9,
        atol=1e-9,
    )
    assert listed(pattern, geometry) == keys
    assert pattern.pairs(geometry) == sum(map(len, keys))


@pytest.mark.parametrize("kind", ["nearby", "full"])
def test_patterns_of_cross_attention_take_two_grids(kind: AttentionKind) -> None:
    geometry = Geometry(Grid(4, 4, 3), Grid(3, 2, 1), Extent(3, 3, 3), False)
    query = torch.randn(2, 48, 2, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 6, 2, 8, dtype=torch.float64)
    keys, pattern = visible_keys(kind, geometry, None), pattern_of(kind)
    output = pattern.attend(query, key, value, geometry, None)
    torch.testing.assert_close(output, brute_force(query, key, value, keys, None))
    assert listed(pattern, geometry) == keys
    assert pattern.pairs(geometry) == sum(map(len, keys))


@pytest.mark.parametrize("kind", ["block_sparse", "axial"])
def test_patterns_of_one_grid_refuse_two(kind: AttentionKind) -> None:
    geometry = Geometry(Grid(2, 2, 2), Grid(2, 2, 1), Extent(3, 3, 3), False)
    tensor = torch.zeros(1, 8, 1, 4)
    with pytest.raises(ValueError, match="context_grid must equal grid"):
        pattern_of(kind).attend(tensor, tensor[:, :4], tensor[:, :4], geometry, None)


def test_pairs_grow_as_the_paper_says() -> None:
    """At the paper's video grid, not causal: (hws)², hws·(h+w+s − 2), and 2·hws·√hws at most."""
    grid = Grid(21, 21, 10)
    geometry = Geometry(grid, grid, Extent(3, 3, 3), False)
    pairs = {kind: pattern_of(kind).pairs(geometry) for kind in KINDS}
    assert pairs["full"] == 4410**2
    # The query's own cell lies on all three lines and counts once.
    assert pairs["axial"] == 4410 * (21 + 21 + 10 - 2)
    assert pairs["nearby"] == 104_188
    assert pairs["block_sparse"] <= 4410 * (66 + 67)
    in_ten = pattern_of("block_sparse", 10).pairs(geometry)
    assert in_ten == 10 * 441**2 + 4410 * 9


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_follows_double(kind: AttentionKind) -> None:
    grid = Grid(5, 4, 3)
    geometry = Geometry(grid, grid, Extent(3, 3, 3), True)
    query, key, value = torch.randn(3, 2, grid.cells, 2, 16, dtype=torch.float64)
    exact = pattern_of(kind).attend(query, key, value, geometry, None)
    half = pattern_of(kind).attend(*(t.bfloat16() for t in (query, key, value)), geometry, None)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_sparse_kinds_stays_below_a_dense_score_matrix(kind: AttentionKind) -> None:
    grid = Grid(21, 21, 10)
    geometry = Geometry(grid, grid, Extent(3, 3, 3), True)
    query = torch.randn(1, grid.cells, 1, 8)
    with LargestTensor() as largest:
        pattern_of(kind).attend(query, query, query, geometry, None)
    assert largest.cells <= grid.cells * 140


@pytest.mark.parametrize("encoder", KINDS)
@pytest.mark.parametrize("decoder", KINDS)
def test_encoder_and_decoder_choose_apart(encoder: AttentionKind, decoder: AttentionKind) -> None:
    torch.manual_seed(0)
    config = NuwaConfig(
        width=32,
        heads=4,
        encoder_layers=1,
        decoder_layers=2,
        codebook_size=50,
        code_dim=8,
        text_vocabulary=40,
        position_grid=(5, 4, 3),
        encoder_attention=encoder,
        decoder_attention=decoder,
        sparse_blocks=4,
    )
    model, grid, sketch = Nuwa(config).double().eval(), Grid(5, 4, 3), Grid(4, 3, 1)
    context = Context("visual", torch.randint(0, 50, (1, sketch.cells)), sketch)
    target = torch.randint(0, 50, (1, grid.cells))
    logits = model(context, target, grid)
    for n in range(0, grid.cells, 7):
        changed = target.clone()
        changed[:, n] = (changed[:, n] + 1) % 50
        moved = (model(context, changed, grid) - logits).abs().amax((0, 2)) > 1e-12
        assert not moved[: n + 1].any()
        assert moved[n + 1]

    layer = model.decoder[0]
    assert isinstance(layer, DecoderLayer)
    assert layer.self_attention.pattern == pattern_of(decoder, 4)
    cross = "full" if decoder == "full" else "nearby"
    assert layer.cross_attention.pattern == pattern_of(cross)
    assert isinstance(model.encoder[0].attention, Attention)
    assert model.encoder[0].attention.pattern == pattern_of(encoder, 4)

    extent = config.visual_extent(sketch)
    plain = config.model_copy(update={"encoder_attention": "nearby", "decoder_attention": "nearby"})
    counted, usual = (forward_flops(each, "visual", sketch, grid) for each in (config, plain))
    more = counted - usual
    across = Geometry(grid, sketch, extent, False)
    inside = Geometry(sketch, sketch, extent, False)
    own = Geometry(grid, grid, config.visual_extent(grid), True)
    pairs = sum(
        layers * (pair_count(kind, geometry) - pair_count("nearby", geometry))
        for layers, kind, geometry in ((1, encoder, inside), (2, decoder, own), (2, cross, across))
    )
    assert more == 4 * config.width * pairs


def test_weights_fit_every_kind() -> None:
    """One checkpoint's names serve all attentions."""
    base = NuwaConfig(width=32, heads=4, encoder_layers=1, decoder_layers=1, code_dim=8)
    with torch.device("meta"):
        names = [
            set(Nuwa(base.model_copy(update={"decoder_attention": kind})).state_dict())
            for kind in KINDS
        ]
    assert all(other == names[0] for other in names)


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"decoder_attention[\s\S]*'block_sparse'"):
        NuwaConfig(decoder_attention="blocks")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="sparse_blocks"):
        NuwaConfig(sparse_blocks=0)
