"""The step of the real recipe, tried out at a small size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_command_line

from benchmarks.harness.step_plan import Mix, token_batches
from megatron_nuwa.training.recipe import load_recipe


def test_a_trial_run_steps_and_writes_the_prediction_beside_it(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    command = ("-m", "benchmarks.real_step", "--dry-run", "--images", "4", "--output", output)
    done = run_command_line(sys.executable, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert [batch["task"] for batch in report["micro_batches"]] == ["v2v", "t2i"]
    assert [batch["samples"] for batch in report["micro_batches"]] == [1, 4]
    step, _ = report["steps"]
    assert step["seconds"] > step["update_seconds"] > 0
    # Two tasks of random tokens among 96 codes: ln 96 = 4.56 nats each.
    assert step["loss"] == pytest.approx(2 * 4.56, rel=0.1)
    parts = report["predicted_parts_gib"]
    total = sum(size for part, size in parts.items() if part != "host")
    assert report["predicted_gib"] == pytest.approx(total)
    assert report["predicted_over_measured"] == pytest.approx(total / report["peak_gib"])
    assert parts["optimizer"] == pytest.approx(12 * report["parameters"] / 2**30, rel=1e-4)
    assert "peak memory, GiB" in done.stdout
    tokens = 6 * 6 * (4 + 4)
    assert report["tokens_per_second"] == pytest.approx(tokens / report["seconds"])
    assert report["seconds"] == min(step["seconds"] for step in report["steps"])
    # The device's peak in bf16, as plan has it.
    assert report["mfu"] == pytest.approx(report["model_flops"] / report["seconds"] / 0.3e12)


def test_the_parts_of_a_layer_are_timed_each_for_itself() -> None:
    sizes = ("model.width=64", "model.heads=4", "model.position_grid=[4,4,2]")
    command = ("-m", "benchmarks.step_parts", "--clips", "1", "--repeats", "1", *sizes)
    done = run_command_line(sys.executable, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("3 of them at once", "nearby attention", "GELU", "text attention, math"):
        assert part in done.stdout
    # Kernels that a CPU lacks are named with the reason.
    assert "not timed: text attention, flash, packed: Could not run" in done.stdout


def test_a_mix_grows_with_its_images_in_proportion_and_its_shares_are_whole() -> None:
    model = load_recipe(ROOT / "launch/recipes/nuwa_870m.yaml").model
    assert model is not None
    mix = Mix(clips=2, images=4, count=3).scaled(12)
    assert Mix(clips=8, images=4, count=1).scaled(1) == Mix(1, 1, 1)
    assert Mix(clips=8, images=0, count=1).scaled(1) == Mix(1, 0, 1)
    sizes = mix.sizes(model)
    assert [(size.task, size.samples) for size in sizes] == [
        *(("v2v", 12), ("t2v", 12), ("v2v", 12), ("t2i", 24))
    ]
    batches = token_batches(model, sizes)
    assert [batch.share for batch in batches] == [0.5, 1.0, 0.5, 1.0]
    assert [tuple(batch.target.shape) for batch in batches[2:]] == [(12, 4410), (24, 441)]


def test_a_gpu_is_asked_for_where_one_is_needed(tmp_path: Path) -> None:
    command = ("-m", "benchmarks.real_step", "--dry-run", "--largest", "--output", tmp_path / "no")
    done = run_command_line(sys.executable, *command)
    assert done.returncode != 0
    assert "--largest and --profile need a GPU" in done.stderr
    assert not (tmp_path / "no").exists()
