"""A run that is killed at any moment, and started again on another layout each time."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
from helpers import SmallWorld
from ranks import Ranks

from megatron_nuwa.files import sha256_of
from megatron_nuwa.training.checkpoint import Checkpoints, step_of

STEPS = 30
# Pipeline, tensor and ZeRO stage.
LAYOUTS = {"pipeline": (2, 1, 1), "tensor": (1, 2, 1), "replicas": (1, 1, 1), "zero3": (1, 1, 3)}
FIGURES = ("train/loss", "train/loss/t2i", "train/loss/v2v", "train/loss/t2v")


def hashes(folder: Path) -> dict[str, str]:
    """Of whole checkpoints; others begin with a dot."""
    return {str(p): sha256_of(p) for p in folder.glob("step_*/**/*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [12])
def test_kills_on_the_move_leave_nothing_that_the_next_start_notices(
    small_world: SmallWorld, tmp_path: Path, kills: int
) -> None:
    """Every second one while the state is being taken over, the others later."""
    dice = random.Random(kills)
    for name, (pipeline, tensor, stage) in LAYOUTS.items():
        parallel = {"pipeline": pipeline, "tensor": tensor}
        contents = {"parallel": parallel, "zero_optimization": {"stage": stage}}
        (tmp_path / f"{name}.json").write_text(json.dumps(contents))

    def start(name: str, run: Path, log: str) -> Ranks:
        return Ranks(
            2,
            tmp_path / log,
            *(small_world.recipe, f"run={run}", f"schedule.steps={STEPS}"),
            *("evaluation=null", "training.checkpoint_every=2"),
            *("--deepspeed_config", tmp_path / f"{name}.json"),
        )

    with start("replicas", tmp_path / "whole", "whole") as ranks:
        assert ranks.wait(600) == [0, 0], ranks.output()
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    with start("pipeline", run, "first") as ranks:
        assert ranks.wait_for(checkpoints.all), ranks.output()
    for kill in range(kills):
        newest, complaints = checkpoints.newest()
        assert newest is not None
        assert not complaints
        before = json.loads((newest / "state.json").read_text())["layout"]
        written_by = tuple(before[field] for field in ("pipeline", "tensor", "zero_stage"))
        others = [name for name, layout in LAYOUTS.items() if layout != written_by]
        whole = hashes(run / "checkpoints")
        with start(dice.choice(others), run, f"start_{kill}") as ranks:
            log = ranks.logs[0]
            if kill % 2:
                assert ranks.wait_for_step(step_of(newest) + dice.randint(1, 3)), ranks.output()
            else:
                lines = dice.randint(1, 10)
                taken = "weights taken over: "
                reached = ranks.wait_for(lambda: log.read_text().count(taken) >= lines)  # noqa: B023
                assert reached, ranks.output()
            dice.choice(ranks.processes).send_signal(signal.SIGKILL)
            codes = ranks.wait()
            assert -signal.SIGKILL in codes
            assert f"continuing after step {step_of(newest)}" in log.read_text() or kill % 2 == 0
        if kill % 2 == 0 and "step " not in log.read_text().partition("continuing")[2]:
            assert hashes(run / "checkpoints") == whole
    with start("replicas", run, "end") as ranks:
        assert ranks.wait(600) == [0, 0], ranks.output()
    stayed, moved = losses(tmp_path / "whole"), losses(run)
    for number, (step, figures) in enumerate(moved, start=1):
        assert step == number
        assert figures == pytest.approx(dict(stayed)[step], rel=1e-6), step
    assert len(moved) == len(stayed) == STEPS


def losses(run: Path) -> list[tuple[int, list[float]]]:
    """The losses of every logged step, in the log's order."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], [line[tag] for tag in FIGURES]) for line in lines if FIGURES[0] in line]
