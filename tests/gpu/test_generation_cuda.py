"""Sampling on a GPU: the graph of one step, and what a batch may change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_nuwa.generation.decoding import CachedDecoder
from megatron_nuwa.generation.drawing import SamplingSettings, uniform_numbers
from megatron_nuwa.generation.row_linear import LogitHead
from megatron_nuwa.generation.sampling import Sampler, generate_tokens
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
GRID = Grid(5, 4, 4)
CODES, WORDS = 60, 40
SETTINGS = SamplingSettings(top_k=20, top_p=0.95, guidance=2.0)


def make_model(dtype: torch.dtype, **changes: object) -> Nuwa:
    torch.manual_seed(0)
    config = NuwaConfig(
        width=128,
        heads=2,
        encoder_layers=2,
        decoder_layers=3,
        codebook_size=CODES,
        code_dim=8,
        text_vocabulary=WORDS,
        position_grid=tuple(GRID),
        **changes,  # type: ignore[arg-type]
    )
    model = Nuwa(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.to("cuda", dtype)


def text(batch: int, seed: int = 1) -> Context:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (batch, 77), generator=generator)
    words = torch.randint(2, 20, (batch, 1), generator=generator)
    return Context("text", tokens, Grid(1, 1, 77), torch.arange(77) < words).to(
        torch.device("cuda")
    )


def rows_of(context: Context, rows: list[int]) -> Context:
    assert context.mask is not None
    return replace(context, tokens=context.tokens[rows], mask=context.mask[rows])


@pytest.mark.parametrize("kind", ["nearby", "full", "axial", "block_sparse"])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_pass(kind: str) -> None:
    model = make_model(torch.float32, decoder_attention=kind)
    tokens = torch.randint(0, CODES, (3, GRID.cells), device="cuda")
    context = text(3)
    expected = model(context, tokens, GRID)
    decoder = CachedDecoder(model, [context], GRID)
    decoder.write(0, tokens)
    decoder.skip(27)
    for cell in range(27, GRID.cells):
        torch.testing.assert_close(decoder.logits(), expected[:, cell], rtol=0, atol=1e-4)
        decoder.append(tokens[:, cell])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nearby", "full", "axial", "block_sparse"])
@torch.no_grad()
def test_the_graph_of_a_step_gives_the_tokens_of_the_step(kind: str, dtype: torch.dtype) -> None:
    model = make_model(dtype, decoder_attention=kind)
    generator = torch.Generator().manual_seed(4)
    known = torch.randint(0, CODES, (3, GRID.cells), generator=generator).cuda()
    is_known = torch.rand(3, GRID.cells, generator=generator).cuda() < 0.3
    is_known[:, :9] = is_known[:, 30:47] = True
    samplers = []
    for graphed in (True, False):
        decoder = CachedDecoder(model, [text(3), text(3, seed=9)], GRID)
        uniforms = uniform_numbers([1, 2, 3], 0, GRID.cells)
        sampler = Sampler(decoder, SETTINGS, uniforms, (known, is_known))
        if not graphed:
            sampler.advance = sampler.step
        list(sampler.run())
        samplers.append(sampler)
    first, second = (sampler.decoder.tokens(0, GRID.cells) for sampler in samplers)
    assert torch.equal(first, second)
    assert torch.equal(first[is_known], known[is_known])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sample_is_the_same_in_batches_of_up_to_eight_with_guidance(dtype: torch.dtype) -> None:
    model, context, without = make_model(dtype), text(8), text(8, seed=9)

    def sample(rows: list[int]) -> torch.Tensor:
        return generate_tokens(
            model,
            rows_of(context, rows),
            rows_of(without, rows),
            GRID,
            [100 + row for row in rows],
            SETTINGS,
        )

    together = sample(list(range(8)))
    for rows in ([0], [5], [7, 2], [1, 3, 6, 4, 0]):
        assert torch.equal(sample(rows), together[rows])


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_bf16_logits_leave_their_product_in_fp32(tied: bool) -> None:
    model = make_model(torch.bfloat16, tie_head=tied)
    decoder = CachedDecoder(model, [text(3)], GRID)
    logits = decoder.logits()
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    # One of 16 rows, as every batch of up to 16 is padded.
    x, weight = torch.randn(16, 128, device="cuda"), torch.randn(CODES, 128, device="cuda")
    x, weight = x.bfloat16(), weight.bfloat16()
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(LogitHead(weight)(x).double(), expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_step_asks_the_device_nothing() -> None:
    decoder = CachedDecoder(make_model(torch.bfloat16), [text(2), text(2, seed=9)], GRID)
    sampler = Sampler(decoder, SETTINGS, uniform_numbers([1, 2], 0, GRID.cells))
    # Tables move to the device in the first step, and the graph is captured in its first.
    sampler.step()
    sampler.advance()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.step()
        sampler.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
