"""Starts on another layout that are killed while they take the state over."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SmallWorld
from worlds import Scenario, figures, layout, run_world

from megatron_nuwa.files import sha256_of

KILLS = 5


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def start(recipe: Path, run: Path) -> subprocess.Popen[str]:
    """One process, alone, that continues a run to step 8."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.Popen(
        [
            *(sys.executable, "launch/pretrain.py", str(recipe)),
            *(f"run={run}", "training.stop_at_step=8"),
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_start_killed_anywhere_leaves_nothing_that_the_next_one_notices(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    before = Scenario("split", layout(2, 2), ("training.stop_at_step=3",))
    run_world(small_world.recipe, tmp_path, 4, [before])
    runs = [shutil.copytree(tmp_path / "split", tmp_path / name) for name in ("calm", "killed")]
    whole = hashes(runs[1] / "checkpoints")
    moments = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    for _ in range(KILLS):
        process = start(small_world.recipe, runs[1])
        assert process.stdout is not None
        told = 0
        last = moments.randint(1, 10)
        for line in process.stdout:
            told += line.startswith("weights taken over: ")
            if told == last:
                break
        assert told == last
        process.kill()
        process.wait(60)
        process.stdout.close()
        assert hashes(runs[1] / "checkpoints") == whole
    for run in runs:
        output, _ = start(small_world.recipe, run).communicate(timeout=300)
        assert "continuing after step 3" in output, output
    assert figures(runs[1]) == figures(runs[0])
    assert len(figures(runs[0])) == 8
