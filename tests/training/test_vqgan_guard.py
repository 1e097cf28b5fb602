"""The guard of a VQ-GAN: skipped steps, a discriminator that loses weight, the end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.models.vqgan import VqganConfig
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.vqgan_guard import VqganGuard, VqganGuardSettings
from megatron_nuwa.training.vqgan_recipe import VqganData, VqganLoss, VqganRecipe
from megatron_nuwa.training.vqgan_step import VqganStep

SETTINGS = VqganGuardSettings(window=16, patience=2, lowerings=2)


def guard_after(losses: np.ndarray | list[float], said: list[str] | None = None) -> VqganGuard:
    guard = VqganGuard(SETTINGS, [].append if said is None else said.append)
    for step, loss in enumerate(losses):
        assert guard.reason_to_skip(float(loss), 1.0) is None
        guard.accepted(step, float(loss), 1.0, adversarial=False)
    return guard


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(0, 0.3), fallen=st.floats(0.01, 1))
def test_noisy_falling_losses_are_never_skipped(seed: int, noise: float, fallen: float) -> None:
    decay = fallen + (1 - fallen) * np.exp(-np.arange(200) / 30)
    guard_after(decay * np.exp(np.random.default_rng(seed).normal(0, noise, 200)))


def test_jumps_of_loss_or_gradient_and_what_is_no_number_are_skipped() -> None:
    guard = guard_after([0.1] * 20)
    assert "reconstruction loss jumped to 0.9" in (guard.reason_to_skip(0.9, 1.0) or "")
    assert "gradient norm jumped to 200" in (guard.reason_to_skip(0.1, 200.0) or "")
    assert "the gradient norm nan" in (guard.reason_to_skip(0.1, math.nan) or "")
    assert "the loss is inf" in (guard.reason_to_skip(math.inf, 1.0) or "")
    # With a level of its own to find first, after what changes the loss on purpose.
    guard.expect_jump()
    assert guard.reason_to_skip(0.9, 200.0) is None


def test_steps_skipped_in_a_row_lower_the_adversarial_weight_and_end_the_run_at_last() -> None:
    said: list[str] = []
    guard = guard_after([0.1] * 20, said)
    for step in range(20, 24):
        guard.skipped(step, "it jumped", adversarial=True)
    assert guard.adversarial_scale == 0.25
    assert guard.skipped_steps == 4
    assert "step 23: 2 steps in a row were skipped" in said[-1]
    assert "lowered to 0.25 times" in said[-1]
    guard.skipped(24, "it jumped", adversarial=True)
    guard.accepted(25, 0.1, 1.0, adversarial=True)
    guard.skipped(26, "it jumped", adversarial=True)
    with pytest.raises(UserError, match="although the adversarial weight was lowered 2 times"):
        guard.skipped(27, "it jumped", adversarial=True)


def test_without_a_discriminator_steps_skipped_in_a_row_end_the_run_and_one_process_tells() -> None:
    guard = guard_after([0.1] * 20)
    guard.skipped(20, "it jumped", adversarial=False)
    with pytest.raises(UserError, match="training stopped at step 21, because 2 steps in a row"):
        guard.skipped(21, "it jumped", adversarial=False)
    other = VqganGuard(SETTINGS.model_copy(update={"patience": 1}), None)
    with pytest.raises(ReportedElsewhereError):
        other.skipped(0, "it jumped", adversarial=False)


def test_a_loss_that_creeps_away_from_the_discriminator_s_start_lowers_its_weight() -> None:
    said: list[str] = []
    guard = guard_after([0.1] * 20, said)
    guard.discriminator_starts()
    for step in range(20, 60):
        guard.accepted(step, 0.1 * 1.05 ** (step - 20), 1.0, adversarial=True)
    assert guard.adversarial_scale == 0.5
    assert "has risen to" in said[0]
    # What a discriminator usually costs changes nothing.
    usual = guard_after([0.1] * 20)
    usual.discriminator_starts()
    for step in range(20, 100):
        usual.accepted(step, 0.15, 1.0, adversarial=True)
    assert usual.adversarial_scale == 1


def test_a_discriminator_without_a_finite_gradient_is_not_changed_for_ever() -> None:
    guard = guard_after([0.1] * 20)
    assert guard.discriminator_takes(20, 3.0)
    for step in (21, 22):
        guard.accepted(step, 0.1, 1.0, adversarial=True)
        assert not guard.discriminator_takes(step, math.nan)
    assert guard.adversarial_scale == 0.5


def test_off_it_ends_at_the_first_gradient_that_is_no_number() -> None:
    guard = VqganGuard(VqganGuardSettings(enabled=False), [].append)
    reason = guard.reason_to_skip(math.nan, 1.0)
    assert reason is not None
    with pytest.raises(UserError, match="training stopped at step 7"):
        guard.skipped(7, reason, adversarial=False)


def test_a_restored_guard_judges_like_the_one_before() -> None:
    guard = guard_after([0.1] * 20)
    guard.discriminator_starts()
    guard.skipped(20, "it jumped", adversarial=True)
    other = VqganGuard(SETTINGS, [].append)
    other.restore(guard.state())
    assert other.state() == guard.state()
    other.skipped(21, "it jumped", adversarial=True)
    assert other.adversarial_scale == 0.5


def test_a_step_that_is_skipped_changes_no_weight_and_no_average_of_them() -> None:
    recipe = VqganRecipe(
        run="unused",
        model=VqganConfig(
            image_size=16, downsampling=8, base_channels=8, residual_blocks=1, codebook_size=8
        ),
        data=VqganData(train=["unused"]),
        loss=VqganLoss(
            perceptual_weight=0,
            discriminator_start=0,
            discriminator_channels=8,
            discriminator_layers=1,
        ),
        ema_decay=0.5,
        steps=10,
        batch_size=2,
    )
    with join_processes() as processes:
        state = VqganStep(recipe, 0, processes)
        healthy = torch.rand(2, 3, 16, 16) * 2 - 1
        state(0, healthy)

        def weights() -> list[torch.Tensor]:
            assert state.discriminator is not None
            networks = (state.model, state.tokenizer, state.discriminator)
            return [p.detach().clone() for n in networks for p in n.parameters()]

        before, usage = weights(), state.keeper.usage.clone()
        figures, counts = state(1, torch.full_like(healthy, math.nan))
        assert all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
        assert torch.equal(state.keeper.usage, usage)
        assert float(counts.sum()) == 0
        assert figures["train/skipped_steps"] == 1
        assert all(torch.isfinite(value) for value in figures.values())
        state(2, healthy)
        assert not all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
