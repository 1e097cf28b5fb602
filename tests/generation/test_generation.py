"""Cached decoding and sampling rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_nuwa.generation.decoding import CachedDecoder
from megatron_nuwa.generation.drawing import SamplingSettings, draw, filtered, uniform_numbers
from megatron_nuwa.generation.sampling import generate_tokens
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig


def small_model(**changes: object) -> Nuwa:
    torch.manual_seed(0)
    config = {
        "width": 32,
        "heads": 4,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "codebook_size": 50,
        "code_dim": 8,
        "text_vocabulary": 40,
        "position_grid": (5, 4, 3),
        **changes,
    }
    model = Nuwa(NuwaConfig(**config)).eval()
    with torch.no_grad():
        # Initial weights are so small that every context would give nearly the same logits.
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def text(batch: int, words: int = 6) -> Context:
    tokens = torch.randint(0, 40, (batch, 77), generator=torch.Generator().manual_seed(1))
    return Context("text", tokens, Grid(1, 1, 77), torch.arange(77).expand(batch, 77) < words)


def sketch(batch: int) -> Context:
    tokens = torch.randint(0, 50, (batch, 9), generator=torch.Generator().manual_seed(2))
    return Context("visual", tokens, Grid(3, 3, 1))


@pytest.mark.parametrize("context", [text(2), sketch(2)], ids=["text", "sketch"])
@pytest.mark.parametrize("grid", [Grid(5, 4, 1), Grid(5, 4, 3)], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "post", "cross_attention": "sequential", "tie_head": True},
        {"encoder_attention": "axial", "decoder_attention": "full"},
        {"encoder_attention": "full", "decoder_attention": "axial"},
        {"encoder_attention": "block_sparse", "decoder_attention": "block_sparse"},
        {"decoder_attention": "block_sparse", "sparse_blocks": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_pass(
    context: Context, grid: Grid, changes: dict[str, object]
) -> None:
    model = small_model(**changes).double()
    tokens = torch.randint(0, 50, (2, grid.cells))
    expected = model(context, tokens, grid)
    decoder = CachedDecoder(model, [context], grid)
    for n in range(grid.cells):
        torch.testing.assert_close(decoder.logits(), expected[:, n].float(), rtol=0, atol=1e-6)
        decoder.append(tokens[:, n])


def test_a_sample_depends_on_its_own_seed_and_prompt_only() -> None:
    model, grid = small_model(), Grid(4, 4, 2)
    context, nothing = text(3), text(3, words=2)
    settings = SamplingSettings(top_k=20, guidance=2.0)
    together = generate_tokens(model, context, nothing, grid, [5, 6, 7], settings)
    for row, seed in enumerate((5, 6, 7)):
        own, none = (
            Context("text", c.tokens[row : row + 1], c.grid, c.mask[row : row + 1])  # type: ignore[index]
            for c in (context, nothing)
        )
        alone = generate_tokens(model, own, none, grid, [seed], settings)
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together[0], together[1])


def test_given_cells_are_kept_and_shape_the_rest() -> None:
    model, grid = small_model(), Grid(4, 4, 2)
    is_known = torch.zeros(grid.cells, dtype=torch.bool)
    is_known[[0, 1, 2, 3, 9, 20]] = True
    outputs = []
    for token in (3, 4):
        known = torch.full((1, grid.cells), token)
        outputs.append(
            generate_tokens(
                model,
                text(1),
                text(1),
                grid,
                [1],
                SamplingSettings(),
                known=known,
                is_known=is_known,
            )
        )
        assert torch.equal(outputs[-1][:, is_known], known[:, is_known])
    assert not torch.equal(outputs[0][:, ~is_known], outputs[1][:, ~is_known])


def test_what_is_not_known_may_hold_anything() -> None:
    model, grid = small_model(), Grid(4, 4, 2)
    # Some cells are known in one row only, and none of the first frame's last.
    is_known = torch.rand(2, grid.cells, generator=torch.Generator().manual_seed(3)) < 0.4
    is_known[:, 12:16] = False
    found = [
        generate_tokens(
            model,
            text(2),
            text(2),
            grid,
            [1, 2],
            SamplingSettings(),
            known=torch.where(is_known, 7, unknown),
            is_known=is_known,
        )
        for unknown in (0, 49, -1, 1 << 40)
    ]
    for tokens in found:
        assert (tokens[is_known] == 7).all()
        assert torch.equal(tokens, found[0])
    known, wrong = torch.zeros(2, grid.cells, dtype=torch.int64), is_known.long()
    given = {"known": known, "is_known": wrong}
    with pytest.raises(ValueError, match="is_known must be bool"):
        generate_tokens(model, text(2), text(2), grid, [1, 2], SamplingSettings(), **given)


@torch.no_grad()
def test_rows_of_equal_words_and_other_masks_are_told_apart() -> None:
    model, grid = small_model().double(), Grid(4, 4, 1)
    words = text(1).tokens.expand(3, -1)
    mask = torch.arange(77) < torch.tensor([[6], [30], [6]])
    context = Context("text", words, Grid(1, 1, 77), mask)
    tokens = torch.randint(0, 50, (1, grid.cells)).expand(3, -1)
    expected = model(context, tokens, grid)
    assert not expected[0].allclose(expected[1])
    decoder = CachedDecoder(model, [context], grid)
    for n in range(3):
        torch.testing.assert_close(decoder.logits(), expected[:, n].float(), rtol=0, atol=1e-6)
        decoder.append(tokens[:, n])


def test_guidance_mixes_the_two_branches() -> None:
    """At guidance 0 only the text-free branch speaks, so the prompt has no influence."""
    model, grid = small_model(), Grid(4, 4, 1)
    settings = SamplingSettings(guidance=0.0)
    first = generate_tokens(model, text(1), text(1, words=2), grid, [3], settings)
    second = generate_tokens(model, text(1, words=30), text(1, words=2), grid, [3], settings)
    plain = generate_tokens(model, text(1, words=2), text(1), grid, [3], SamplingSettings())
    assert torch.equal(first, second)
    assert torch.equal(first, plain)


def test_the_least_and_the_largest_number_draw_tokens_that_there_are() -> None:
    ends = torch.tensor([0, (2**32 - 1) / 2**32], dtype=torch.float64)
    for codes in (3, 12_288):
        assert draw(torch.zeros(2, codes), SamplingSettings(), ends).tolist() == [0, codes - 1]
    # Probabilities in fp32 add up to a little less than 1, or more.
    logits = torch.randn(64, 3000, generator=torch.Generator().manual_seed(0))
    assert (draw(logits, SamplingSettings(), ends[1:].expand(64)) < 3000).all()
    # What is filtered out is never drawn, also at the ends.
    logits = torch.tensor([[0.0, 5.0, 4.0, 0.0]]).expand(2, -1)
    assert draw(logits, SamplingSettings(top_k=2), ends).tolist() == [1, 2]
    assert draw(logits, SamplingSettings(top_p=0.9), ends).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_logits_say(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    settings = SamplingSettings(temperature=temperature)
    counts = draw(logits.expand(10_000, -1), settings, uniforms).bincount(minlength=4)
    expected = (logits / temperature).softmax(-1)
    assert (counts / 10_000 - expected).abs().max() < 3e-4


def test_numbers_belong_to_seed_and_cell_alone() -> None:
    whole = uniform_numbers([7, 8, -7], 0, 23)
    for first in range(10):
        assert uniform_numbers([7, 8, -7], first, 9).equal(whole[:, first : first + 9])
    assert len(set(whole.flatten().tolist())) == 69
    assert whole.min() >= 0
    assert whole.max() < 1
    # All of the interval is used.
    many = uniform_numbers([0], 0, 4000)
    assert many.max() > 0.99
    assert abs(many.mean() - 0.5) < 0.02


def test_filters() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def kept(**settings: object) -> list[bool]:
        return filtered(logits, SamplingSettings(**settings)).isfinite()[0].tolist()  # type: ignore[arg-type]

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.51) == [True, True, False, False]
    assert kept(top_p=0.01) == [True, False, False, False]
    assert kept(top_k=3, top_p=0.84) == [True, True, False, False]
    assert draw(logits, SamplingSettings(temperature=0), torch.zeros(1)).item() == 0
    uniforms = torch.arange(2000) / 2000
    drawn = draw(logits.expand(2000, -1), SamplingSettings(), uniforms)
    shares = np.bincount(drawn, minlength=4) / 2000
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"guidance": -1}],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplingSettings(**settings)  # type: ignore[arg-type]
