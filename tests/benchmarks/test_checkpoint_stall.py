"""The stall of a save, tried out at a small size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from helpers import run_command_line


def test_a_trial_run_saves_three_times_and_writes_the_stalls(tmp_path: Path) -> None:
    output = tmp_path / "stall.json"
    options = ("--dry-run", "--images", "1", "--folder", tmp_path, "--output", output)
    done = run_command_line(sys.executable, "-m", "benchmarks.checkpoint_stall", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    # bf16: weights, master weights and two moments, and the weights again for generation.
    assert report["checkpoint_gib"] * 2**30 > 10 * report["parameters"]
    assert report["seconds"].keys() == {"blocking", "beside", "at once"}
    assert all(0 < share < 1 for share in report["of_blocking"].values())
    assert "of a blocking save" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["stall.json"]
