"""Drawing tokens where numbers are extreme or few: cold, strongly guided, broken, bf16."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_decoding import make_model, rows_of, text
from test_tasks import request

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.decoding import CachedDecoder
from megatron_nuwa.generation.drawing import (
    MOST_GUIDANCE,
    SamplingSettings,
    draw,
    filtered,
    guided,
)
from megatron_nuwa.generation.row_linear import LogitHead, padded_rows
from megatron_nuwa.generation.sampling import NonFiniteLogitsError, generate_tokens
from megatron_nuwa.generation.tasks import generate, prepare
from megatron_nuwa.generation.trained import CheckpointFacts, Generator
from megatron_nuwa.grid import Grid


def some_logits(rows: int = 64, codes: int = 500) -> torch.Tensor:
    return 9 * torch.randn(rows, codes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-320])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_any_cold_temperature_draws_the_likeliest(
    temperature: float, filters: dict[str, float]
) -> None:
    logits = some_logits()
    settings = SamplingSettings(temperature, **filters)  # type: ignore[arg-type]
    assert torch.equal(draw(logits, settings, torch.rand(64) * 0.99), logits.argmax(-1))


def test_the_strongest_guidance_mixes_finite_logits() -> None:
    logits = some_logits()
    mixed = guided(logits, MOST_GUIDANCE)
    assert bool(mixed.isfinite().all())
    tokens = draw(mixed, SamplingSettings(), torch.rand(32) * 0.99)
    assert torch.equal(tokens, (logits[:32] - logits[32:]).argmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 1e39}, "guidance must be 0 to 1,000,000, not 1e.39"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
    ],
)
def test_settings_that_could_only_give_no_numbers_are_refused(
    settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_model_is_found_out_at_the_end_of_a_frame(
    temperature: float, guidance: float, value: float
) -> None:
    """One bad logit among many is enough, and no frame made of it is handed out."""
    model = make_model(tie_head=False)
    assert model.head is not None
    with torch.no_grad():
        model.head.weight[7, 3] = value
    shown: list[int] = []
    cells: list[None] = []
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite in frame 0"):
        generate_tokens(
            model,
            text(2),
            text(2, seed=9),
            Grid(4, 4, 3),
            [1, 2],
            SamplingSettings(temperature, guidance=guidance),
            on_token=lambda: cells.append(None),
            on_frame=lambda frame, _: shown.append(frame),
        )
    assert shown == []
    assert len(cells) == 15


def test_the_checkpoint_of_a_broken_model_is_named(generator: Generator) -> None:
    broken = copy.deepcopy(generator.model)
    with torch.no_grad():
        next(broken.decoder.parameters()).fill_(float("nan"))
    facts = CheckpointFacts(Path("run/checkpoints/step_7"), 7, "")
    generator = replace(generator, model=broken, checkpoint=facts)
    with pytest.raises(UserError) as caught:
        generate(generator, prepare(generator, [request("t2v")]), SamplingSettings())
    assert str(caught.value) == (
        "run/checkpoints/step_7 cannot be sampled from: the model's logits are NaN or infinite in "
        "frame 0: its weights are damaged or its training has diverged; name an earlier one"
    )


@pytest.mark.parametrize("levels", [1, 3, 40])
def test_top_k_keeps_k_of_equal_logits(levels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(0, levels, (9, 500), generator=generator).float()
    for count in (1, 2, 77, 499):
        kept = filtered(logits, SamplingSettings(top_k=count))
        assert bool((kept.isfinite().sum(-1) == count).all())
        assert torch.equal(kept.topk(count).values, logits.topk(count).values)
        # Each row for itself.
        assert torch.equal(filtered(logits[4:5], SamplingSettings(top_k=count)), kept[4:5])


@pytest.mark.parametrize("static", [False, True], ids=["host", "static"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_of_a_bf16_model_have_the_bits_of_fp32(static: bool, tied: bool) -> None:
    model = make_model(codebook_size=500, tie_head=tied).bfloat16()
    decoder = CachedDecoder(model, [text(3)], Grid(4, 4, 3), static=static)
    logits = decoder.logits()
    assert logits.dtype == torch.float32
    rounded = logits.bfloat16().float()
    assert float((logits != rounded).float().mean()) > 0.9
    assert all(row.unique().numel() > 495 for row in logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [48, 256, 1280])
@torch.no_grad()
def test_a_row_of_logits_is_that_of_the_exact_product_among_any_others(
    dtype: torch.dtype, inputs: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, inputs, generator=generator).to(dtype)
    x = torch.randn(48, inputs, generator=generator).to(dtype)
    head = LogitHead(weight)
    whole = head(x)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-4)
    for count in range(1, 18):
        rows = torch.randperm(48, generator=generator)[:count]
        padded = torch.zeros(padded_rows(count, x.device), inputs, dtype=dtype)
        padded[:count] = x[rows]
        assert torch.equal(head(padded)[:count], whole[rows]), count


def test_samples_of_a_bf16_model_are_the_same_in_every_batch() -> None:
    model, most = make_model(width=256, heads=4).bfloat16(), 6
    contexts = text(most), text(most, seed=9)
    settings = SamplingSettings(top_k=20, top_p=0.95, guidance=2.0)

    def sample(rows: list[int]) -> torch.Tensor:
        context, without = (rows_of(each, rows) for each in contexts)
        seeds = [1000 + 7 * row for row in rows]
        return generate_tokens(model, context, without, Grid(4, 4, 2), seeds, settings)

    together = sample(list(range(most)))
    for rows in ([0], [5, 2], [3, 1, 4]):
        assert torch.equal(sample(rows), together[rows])
