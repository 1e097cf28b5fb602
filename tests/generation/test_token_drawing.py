"""Drawing tokens where numbers are extreme: cold, strongly guided, or broken."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_decoding import make_model, text
from test_tasks import request

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.drawing import MOST_GUIDANCE, SamplingSettings, draw, guided
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
