"""The guard skips losses that jump or are no number, never healthy ones, and stops in the end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.training.guard import BAD_BATCHES_FILE, Guard, GuardSettings


def healthy_losses(seed: int, start: float, end: float, noise: float, steps: int) -> np.ndarray:
    """A decaying loss with log-normal noise."""
    decay = end + (start - end) * np.exp(-np.arange(steps) / (steps / 6))
    return decay * np.exp(np.random.default_rng(seed).normal(0, noise, steps))


def trained(losses: np.ndarray, guard_settings: GuardSettings | None = None) -> Guard:
    guard = Guard(guard_settings or GuardSettings(), None)
    for loss in losses:
        guard.accepted({"t2i": float(loss)})
    return guard


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    start=st.floats(2, 12),
    fallen=st.floats(0.02, 1),
    noise=st.floats(0, 0.15),
)
def test_constant_and_decaying_noisy_losses_never_trigger(
    seed: int, start: float, fallen: float, noise: float
) -> None:
    guard = Guard(GuardSettings(), None)
    for loss in healthy_losses(seed, start, start * fallen, noise, 400):
        losses = {"t2i": float(loss), "v2v": 9.4}
        assert not guard.verdict(losses).skip
        guard.accepted(losses)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    start=st.floats(2, 12),
    fallen=st.floats(0.3, 1),
    noise=st.floats(0, 0.1),
    steps=st.integers(64, 300),
)
def test_jump_to_three_times_the_loss_triggers(
    seed: int, start: float, fallen: float, noise: float, steps: int
) -> None:
    losses = healthy_losses(seed, start, start * fallen, noise, steps)
    verdict = trained(losses).verdict({"t2i": 3 * float(np.median(losses[-128:]))})
    assert verdict.skip
    assert verdict.reason.startswith("the loss of t2i jumped to ")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps", [0, 10, 200])
def test_what_is_no_number_triggers_from_the_first_step(bad: float, steps: int) -> None:
    guard = trained(np.full(steps, 4.0))
    verdict = guard.verdict({"t2i": 4.0, "v2v": bad})
    assert verdict.skip
    assert verdict.reason == f"the loss of v2v is {bad}"
    assert guard.verdict({"t2i": 4.0}, grad_norm=bad).skip
    assert not guard.verdict({"t2i": 4.0}, grad_norm=1e6).skip


def test_no_jump_is_seen_before_the_guard_is_warm_or_when_it_is_off() -> None:
    assert not trained(np.full(63, 4.0)).verdict({"t2i": 40.0}).skip
    assert trained(np.full(64, 4.0)).verdict({"t2i": 40.0}).skip
    off = trained(np.full(64, 4.0), GuardSettings(enabled=False))
    assert not off.verdict({"t2i": math.nan}).skip


def test_a_guard_that_is_off_writes_dropped_steps_down_and_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / BAD_BATCHES_FILE
    off = Guard(GuardSettings(enabled=False, patience=1), path)
    for step in range(3):
        off.skipped(step, "a gradient is not finite", {"t2i": math.nan}, {"t2i": [["images:a"]]})
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in entries] == [0, 1, 2]
    assert off.state()["in_a_row"] == 0


def test_a_noisy_task_is_judged_by_its_own_noise() -> None:
    """Single samples whose losses differ by two are no spikes."""
    guard = trained(np.exp(np.random.default_rng(0).normal(0, 0.5, 128)))
    assert not guard.verdict({"t2i": 3.0}).skip
    assert trained(np.full(128, 1.0)).verdict({"t2i": 3.0}).skip


def test_skipped_losses_do_not_become_the_usual_ones() -> None:
    guard = Guard(GuardSettings(patience=1000), None)
    for _ in range(64):
        guard.accepted({"t2i": 4.0})
    for step in range(999):
        assert guard.verdict({"t2i": 12.0}).skip
        guard.skipped(step, "jump", {"t2i": 12.0}, {})


def test_after_patience_the_run_stops_and_the_items_are_on_disk(tmp_path: Path) -> None:
    path = tmp_path / BAD_BATCHES_FILE
    guard = Guard(GuardSettings(patience=2), path)
    losses = {"t2i": math.nan, "t2v": 4.5}
    items = {"t2i": [["images:a"], ["images:b"]], "t2v": [["clips:é"], ["clips:d"]]}
    guard.skipped(7, "the loss of t2i is nan", losses, items)
    guard.accepted({"t2i": 4.0, "t2v": 4.5})
    guard.skipped(9, "the loss of t2i is nan", losses, items)
    with pytest.raises(UserError) as caught:
        guard.skipped(10, "the loss of t2i is nan", losses, items)
    message = str(caught.value)
    for part in ("t2i, t2v", "step 10", "2 steps in a row", "the loss of t2i is nan", str(path)):
        assert part in message
    assert "\n" not in message
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in entries] == [7, 9, 10]
    assert entries[0] == {
        "step": 7,
        "reason": "the loss of t2i is nan",
        "losses": {"t2i": "nan", "t2v": 4.5},
        "items": items,
    }


def test_other_processes_stop_at_the_same_step_without_a_word(tmp_path: Path) -> None:
    guard = Guard(GuardSettings(patience=1), None)
    with pytest.raises(ReportedElsewhereError):
        guard.skipped(1, "the loss of t2i is nan", {"t2i": math.nan}, {})


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), steps=st.integers(0, 300), skips=st.integers(0, 2))
def test_restored_guard_judges_and_stops_as_the_first_would(
    seed: int, steps: int, skips: int
) -> None:
    guard = trained(healthy_losses(seed, 9.0, 3.0, 0.1, steps + 1))
    for step in range(skips):
        guard.skipped(step, "jump", {"t2i": 9.0}, {})
    again = Guard(GuardSettings(), None)
    again.restore(json.loads(json.dumps(guard.state())))
    for loss in (1.0, 5.0, 6.5, 7.0, 9.0, 30.0):
        assert again.verdict({"t2i": loss}) == guard.verdict({"t2i": loss})
    for step in range(2 - skips):
        again.skipped(step, "jump", {"t2i": 9.0}, {})
    with pytest.raises(UserError):
        again.skipped(9, "jump", {"t2i": 9.0}, {})


def test_a_list_that_cannot_be_written_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = Guard(GuardSettings(patience=2), tmp_path / "absent" / "bad_batches.jsonl")
    guard.skipped(1, "it is no number", {"t2i": float("nan")}, {})
    assert capsys.readouterr().out.startswith("warning: not written: ")
    with pytest.raises(UserError, match="2 steps in a row were skipped"):
        guard.skipped(2, "it is no number", {"t2i": float("nan")}, {})
