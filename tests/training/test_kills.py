"""A run whose processes are killed at any moment ends with the weights of an undisturbed one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, SmallWorld, deepspeed_command
from ranks import SCRIPT, Ranks

from megatron_nuwa.training.checkpoint import Checkpoints, read_manifest, step_of, tag_of
from megatron_nuwa.training.supervised import training_processes

PLAIN = ("evaluation=null", "training.log_every=1", "training.checkpoint_every=1")


def arguments(world: SmallWorld, run: Path, steps: int, *more: str) -> list[str | Path]:
    return [world.recipe, f"run={run}", f"schedule.steps={steps}", *PLAIN, *more]


def final_state(run: Path, steps: int) -> dict[str, Any]:
    """sha256 of every file with weights or optimizer states, and the random states."""
    folder = run / "checkpoints" / tag_of(steps)
    files = read_manifest(folder)
    randoms = [torch.load(path, weights_only=True) for path in sorted(folder.glob("random/*"))]
    return {
        **{
            name: file["sha256"]
            for name, file in files.items()
            if name.endswith(("states.pt", ".safetensors"))
        },
        "random": [{**state, "torch": state["torch"].tolist()} for state in randoms],
    }


def kill_often(world: SmallWorld, folder: Path, count: int, kills: int, steps: int) -> None:
    """Train `steps` steps on `count` processes, with kills; compare with no kills."""
    with Ranks(count, folder, *arguments(world, folder / "whole", steps)) as ranks:
        assert ranks.wait(600) == [0] * count, ranks.output()
    run = folder / "run"
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    dice = random.Random(kills)
    during_saves = 0
    for kill in range(kills):
        before, _ = checkpoints.newest()
        with Ranks(count, folder / f"start_{kill}", *arguments(world, run, steps)) as ranks:
            first = step_of(before) + 1 if before else 1
            assert ranks.wait_for_step(first + dice.randrange(3)), ranks.output()
            if dice.random() < 0.5:
                # Files of a save lie there already, its manifest does not.
                ranks.wait_for(lambda: list(run.glob("checkpoints/.partial/step_*/random/*")), 60)
                during_saves += 1
            else:
                time.sleep(dice.uniform(0, 0.3))
            dice.choice(ranks.processes).send_signal(signal.SIGKILL)
            codes = ranks.wait()
            assert -signal.SIGKILL in codes
            assert 0 not in codes, "a process ended well though another was killed"
            begin = re.search(r"continuing after step (\d+)", ranks.output())
            assert (int(begin[1]) if begin else 0) == first - 1
            assert "Traceback" not in ranks.output()
    with Ranks(count, folder / "end", *arguments(world, run, steps)) as ranks:
        assert ranks.wait(600) == [0] * count, ranks.output()
        assert "is damaged" not in ranks.output()
    assert final_state(run, steps) == final_state(folder / "whole", steps)
    assert during_saves or kills < 5


def test_a_kill_changes_nothing(small_world: SmallWorld, tmp_path: Path) -> None:
    kill_often(small_world, tmp_path, count=2, kills=1, steps=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_change_nothing(small_world: SmallWorld, tmp_path: Path) -> None:
    kill_often(small_world, tmp_path, count=2, kills=30, steps=400)


@pytest.mark.slow
def test_a_supervised_run_goes_on_by_itself_after_a_kill(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    """launch/supervise.py around the deepspeed launcher."""
    steps = 60
    with Ranks(2, tmp_path, *arguments(small_world, tmp_path / "whole", steps)) as ranks:
        assert ranks.wait(300) == [0, 0], ranks.output()
    run = tmp_path / "run"
    command = deepspeed_command(2, SCRIPT, *arguments(small_world, run, steps))
    supervise = [sys.executable, "launch/supervise.py", "--restarts", "3", "--pause", "0"]
    log = tmp_path / "supervised.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*supervise, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 120
        while not (run / "checkpoints/latest").exists():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        killed = training_processes(process.pid)
        assert len(killed) == 2
        killed[1].kill()
        assert process.wait(300) == 0, log.read_text()
    finally:
        process.kill()
    assert "start 2 of at most 4, in 0 s" in log.read_text()
    assert "a process was killed" in log.read_text()
    assert final_state(run, steps) == final_state(tmp_path / "whole", steps)
