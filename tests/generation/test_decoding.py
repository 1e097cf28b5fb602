"""The sampler's core: cached decoding against the whole forward pass, and what seeds promise."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nuwa.generation.decoding import CachedDecoder
from megatron_nuwa.generation.drawing import SamplingSettings, guided, uniform_numbers
from megatron_nuwa.generation.row_linear import RowLinear, padded_rows
from megatron_nuwa.generation.sampling import Sampler, generate_tokens
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig

CODES, WORDS, SKETCH_CODES = 60, 40, 30
LARGEST = Grid(5, 4, 6)
Given = tuple[Tensor, Tensor]


def make_model(**changes: object) -> Nuwa:
    torch.manual_seed(0)
    config: dict[str, object] = {
        "width": 48,
        "heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "codebook_size": CODES,
        "code_dim": 8,
        "text_vocabulary": WORDS,
        "position_grid": tuple(LARGEST),
        "sketch_codebook_size": SKETCH_CODES,
        "sketch_code_dim": 8,
        **changes,
    }
    model = Nuwa(NuwaConfig(**config)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        # Initial weights are so small that every context would give nearly the same logits.
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def text(batch: int, seed: int = 1) -> Context:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (batch, 77), generator=generator)
    words = torch.randint(2, 20, (batch, 1), generator=generator)
    return Context("text", tokens, Grid(1, 1, 77), torch.arange(77) < words)


def visual(batch: int, grid: Grid, seed: int = 2) -> Context:
    generator = torch.Generator().manual_seed(seed)
    return Context(
        "visual", torch.randint(0, CODES, (batch, grid.cells), generator=generator), grid
    )


def sketch(batch: int, grid: Grid) -> Context:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, SKETCH_CODES, (batch, grid.cells), generator=generator)
    return Context("sketch", tokens, grid)


def rows_of(context: Context, rows: list[int]) -> Context:
    mask = None if context.mask is None else context.mask[rows]
    return replace(context, tokens=context.tokens[rows], mask=mask)


CONTEXTS: list[Callable[[int], Context]] = [
    text,
    lambda batch: visual(batch, Grid(3, 3, 1)),
    lambda batch: visual(batch, Grid(5, 4, 6)),
    lambda batch: visual(batch, Grid(2, 4, 3)),
    lambda batch: sketch(batch, Grid(5, 4, 1)),
    lambda batch: sketch(batch, Grid(4, 4, 5)),
]


@pytest.mark.parametrize("static", [False, True], ids=["host", "static"])
@pytest.mark.parametrize("kind", ["nearby", "full", "axial", "block_sparse"])
@pytest.mark.parametrize(
    "changes", [{}, {"norm": "post", "cross_attention": "sequential"}], ids=str
)
@settings(max_examples=6, deadline=None)
@given(
    grid=st.builds(Grid, st.integers(1, 5), st.integers(1, 4), st.integers(1, 6)),
    context=st.sampled_from(CONTEXTS),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_blocks_and_single_cells_equal_the_full_forward_pass(
    static: bool,
    kind: str,
    changes: dict[str, object],
    grid: Grid,
    context: Callable[[int], Context],
    seed: int,
) -> None:
    """fp32, every cell whose logits are asked for, between runs of given cells of any length."""
    model = make_model(decoder_attention=kind, **changes)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, CODES, (3, grid.cells), generator=generator)
    read = context(3)
    expected = model(read, tokens, grid)
    decoder = CachedDecoder(model, [read], grid, static=static)
    decoder.write(0, tokens)
    while decoder.position < grid.cells:
        left = grid.cells - decoder.position
        if torch.rand((), generator=generator) < 0.5:
            decoder.skip(int(torch.randint(1, left + 1, (), generator=generator)))
            continue
        cell = decoder.position
        torch.testing.assert_close(decoder.logits(), expected[:, cell], rtol=0, atol=1e-4)
        decoder.append(tokens[:, cell])


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_clip_of_the_papers_grid_equals_the_full_forward_pass() -> None:
    grid = Grid(21, 21, 10)
    model = make_model(position_grid=tuple(grid), codebook_size=500, width=128, heads=2)
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, 500, (1, grid.cells), generator=generator)
    expected = model(text(1), tokens, grid)
    decoder = CachedDecoder(model, [text(1)], grid)
    decoder.write(0, tokens)
    decoder.skip(441 + 100)
    while decoder.position < grid.cells:
        # Regions: some cells of every row are given.
        if decoder.position % 21 == 6:
            decoder.skip(9)
        cell = decoder.position
        torch.testing.assert_close(decoder.logits(), expected[:, cell], rtol=0, atol=1e-4)
        decoder.append(tokens[:, cell])


@pytest.mark.parametrize("static", [False, True], ids=["host", "static"])
@pytest.mark.parametrize(
    "changes", [{}, {"cross_attention": "sequential"}, {"decoder_attention": "full"}], ids=str
)
@pytest.mark.parametrize("read", CONTEXTS)
@torch.no_grad()
def test_both_branches_of_guidance_equal_their_own_forward_passes(
    static: bool, changes: dict[str, object], read: Callable[[int], Context]
) -> None:
    """The branch without the text may read something else than a text, of another size."""
    model, grid = make_model(**changes), Grid(4, 4, 3)
    tokens = torch.randint(0, CODES, (3, grid.cells))
    with_text, without = read(3), text(3, seed=9)
    expected = torch.cat([model(with_text, tokens, grid), model(without, tokens, grid)])
    decoder = CachedDecoder(model, [with_text, without], grid, static=static)
    decoder.write(0, tokens)
    decoder.skip(5)
    for cell in range(5, grid.cells):
        logits = decoder.logits()
        torch.testing.assert_close(logits, expected[:, cell], rtol=0, atol=1e-4)
        mixed = expected[3:, cell] + 2.5 * (expected[:3, cell] - expected[3:, cell])
        torch.testing.assert_close(guided(logits, 2.5), mixed, rtol=0, atol=5e-4)
        decoder.append(tokens[:, cell])


def random_given(batch: int, grid: Grid, generator: torch.Generator) -> Given:
    known = torch.randint(0, CODES, (batch, grid.cells), generator=generator)
    share = torch.rand(batch, 1, generator=generator)
    is_known = torch.rand(batch, grid.cells, generator=generator) < share
    prefix = torch.randint(0, grid.cells // 2, (batch, 1), generator=generator)
    return known, is_known | (torch.arange(grid.cells) < prefix)


@pytest.mark.parametrize(
    ("changes", "sampling"),
    [
        ({"width": 256, "heads": 4}, SamplingSettings(top_k=20)),
        ({"width": 256, "heads": 4}, SamplingSettings(guidance=2.0, top_p=0.95)),
        ({"decoder_attention": "full"}, SamplingSettings()),
        ({"decoder_attention": "axial", "cross_attention": "sequential"}, SamplingSettings()),
        ({"decoder_attention": "block_sparse"}, SamplingSettings(temperature=0)),
    ],
    ids=["wide", "guided", "full", "axial", "block_sparse"],
)
def test_a_sample_is_the_same_in_every_batch_and_at_every_place(
    changes: dict[str, object], sampling: SamplingSettings
) -> None:
    """Bit for bit, with given cells that differ from row to row, in batches of 1 to 9."""
    model, grid, most = make_model(**changes), Grid(4, 4, 3), 9
    contexts = text(most), text(most, seed=9)
    known, is_known = random_given(most, grid, torch.Generator().manual_seed(4))
    seeds = [1000 + 7 * row for row in range(most)]

    def sample(rows: list[int]) -> Tensor:
        context, without = (rows_of(each, rows) for each in contexts)
        return generate_tokens(
            model,
            context,
            without,
            grid,
            [seeds[row] for row in rows],
            sampling,
            known=known[rows],
            is_known=is_known[rows],
        )

    alone = torch.cat([sample([row]) for row in range(most)])
    assert torch.equal(alone[is_known], known[is_known])
    assert len({tuple(row) for row in alone.tolist()}) == most
    order = random.Random(5)
    for size in range(2, most + 1):
        rows = order.sample(range(most), size)
        assert torch.equal(sample(rows), alone[rows]), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 96), (256, 1024), (1280, 1280)])
@torch.no_grad()
def test_a_row_of_a_linear_layer_has_the_same_bits_among_any_others(
    dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    x = torch.randn(48, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    layer = RowLinear(weight, bias, gelu=True)
    whole = layer(x)
    expected = torch.nn.functional.gelu(x.double() @ weight.double().T + bias.double())
    torch.testing.assert_close(whole.double(), expected, rtol=2e-2, atol=1e-3 * inputs**0.5)
    for count in range(1, 18):
        rows = torch.randperm(48, generator=generator)[:count]
        padded = torch.zeros(padded_rows(count, x.device), inputs, dtype=dtype)
        padded[:count] = x[rows]
        assert torch.equal(layer(padded)[:count], whole[rows]), count
    # A frame of given cells in four rows is a product of many rows.
    frame = x.repeat(37, 1)[: padded_rows(4 * 441, x.device)]
    assert torch.equal(layer(frame)[:48], whole)
    assert torch.equal(layer(frame)[1680:1728], whole)


def test_given_cells_do_not_shift_the_random_numbers_of_others() -> None:
    numbers = uniform_numbers([3, 4, -1], 0, 50)
    assert numbers.shape == (3, 50)
    assert bool(((numbers >= 0) & (numbers < 1)).all())
    assert torch.equal(uniform_numbers([4], 13, 20)[0], numbers[1, 13:33])
    assert numbers.unique().numel() == numbers.numel()
    many = uniform_numbers(range(40), 0, 500)
    assert float(many.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(many.var()) == pytest.approx(1 / 12, abs=0.003)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["nearby", "full", "axial", "block_sparse"])
@torch.no_grad()
def test_the_static_step_that_a_graph_captures_gives_the_ordinary_tokens(
    kind: str, guidance: float
) -> None:
    """Without a graph, on the CPU: the same function, its position in a tensor."""
    model, grid, sampling = make_model(decoder_attention=kind), Grid(4, 4, 3), SamplingSettings(1.0)
    sampling = replace(sampling, guidance=guidance, top_k=20)
    context, without = text(3), text(3, seed=9)
    known, is_known = random_given(3, grid, torch.Generator().manual_seed(4))
    is_known[:, 20:36] = True
    seeds = [5, 6, 7]
    expected = generate_tokens(
        model, context, without, grid, seeds, sampling, known=known, is_known=is_known
    )
    branches = [context] if guidance == 1 else [context, without]
    decoder = CachedDecoder(model, branches, grid, static=True)
    given = known.masked_fill(~is_known, 0), is_known
    sampler = Sampler(decoder, sampling, uniform_numbers(seeds, 0, grid.cells), given)
    done = list(sampler.run())
    assert [first for first, _ in done] == [0, *(stop for _, stop in done[:-1])]
    assert torch.equal(decoder.tokens(0, grid.cells), expected)


def test_frames_arrive_one_by_one_and_every_cell_is_counted() -> None:
    model, grid = make_model(), Grid(3, 4, 4)
    known, is_known = torch.zeros(2, grid.cells, dtype=torch.int64), torch.zeros(grid.cells) > 0
    is_known[: 12 + 5] = True
    is_known[24:36] = True
    arrived: list[tuple[int, Tensor]] = []
    counted: list[None] = []
    tokens = generate_tokens(
        model,
        text(2),
        text(2),
        grid,
        [1, 2],
        SamplingSettings(),
        known=known,
        is_known=is_known,
        on_token=lambda: counted.append(None),
        on_frame=lambda frame, cells: arrived.append((frame, cells)),
    )
    assert len(counted) == grid.cells
    assert [frame for frame, _ in arrived] == [0, 1, 2, 3]
    assert torch.equal(torch.cat([cells for _, cells in arrived], 1), tokens)


def test_what_is_not_known_may_hold_anything() -> None:
    model, grid = make_model(), Grid(2, 2, 2)
    known, is_known = torch.full((1, 8), -1), torch.zeros(8, dtype=torch.bool)
    known[0, 5], is_known[5] = 3, True
    tokens = generate_tokens(
        model, text(1), text(1), grid, [1], SamplingSettings(), known=known, is_known=is_known
    )
    assert tokens[0, 5] == 3
    assert bool(((tokens >= 0) & (tokens < CODES)).all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"known": torch.zeros(1, 8, dtype=torch.int64)}, "known and is_known"),
        ({"known": torch.zeros(1, 7), "is_known": torch.zeros(8) > 0}, r"known must be .*\(1, 8\)"),
        ({"known": torch.zeros(1, 8), "is_known": torch.zeros(2, 8) > 0}, "is_known must be bool"),
        ({"known": torch.zeros(1, 8), "is_known": torch.zeros(8)}, "is_known must be bool"),
    ],
)
def test_given_cells_of_the_wrong_shape_are_refused(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tokens(
            make_model(), text(1), text(1), Grid(2, 2, 2), [1], SamplingSettings(), **given
        )
