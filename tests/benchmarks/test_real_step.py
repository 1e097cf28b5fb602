"""The step of the real recipe, tried out at a small size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import run_command_line


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
