"""A run goes on without a bad batch, and stops with its items written down after several."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from helpers import SmallWorld, lone_process

from megatron_nuwa.data.batches import TaskName
from megatron_nuwa.errors import UserError
from megatron_nuwa.training.checkpoint import Checkpoints, tag_of
from megatron_nuwa.training.engine import Loss
from megatron_nuwa.training.figures import StepFigures
from megatron_nuwa.training.guard import BAD_BATCHES_FILE, Guard, Verdict
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.snapshot import FileRecord, Part


def train(world: SmallWorld, run: Path, *overrides: str) -> list[dict[str, float]]:
    recipe = load_recipe(
        world.recipe, [f"run={run}", "evaluation=null", "training.stop_at_step=6", *overrides]
    )
    pretrain(recipe, recipe.training.deepspeed_config, lone_process())
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def find_bad(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """Have every guard find these of its steps bad, counted from 1."""
    asked: dict[int, int] = {}
    judge = Guard.verdict

    def verdict(guard: Guard, losses: Mapping, grad_norm: float | None = None) -> Verdict:
        asked[id(guard)] = asked.get(id(guard), 0) + 1
        is_bad = asked[id(guard)] in bad
        return Verdict(True, "it was told so") if is_bad else judge(guard, losses, grad_norm)

    monkeypatch.setattr(Guard, "verdict", verdict)


def test_bad_step_is_skipped_logged_and_its_items_are_written_down(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_bad(monkeypatch, 3)
    log = train(small_world, tmp_path / "run")
    assert [line["speed/skipped_steps"] for line in log] == [0, 0, 1, 0, 0, 0]
    assert ["train/loss" in line for line in log] == [True, True, False, True, True, True]
    [entry] = map(json.loads, (tmp_path / "run" / BAD_BATCHES_FILE).read_text().splitlines())
    assert entry["step"] == 3
    assert entry["reason"] == "it was told so"
    assert set(entry["losses"]) == {"t2i", "v2v", "t2v"}
    sizes = {task: [len(names) for names in of] for task, of in entry["items"].items()}
    assert sizes == {"t2i": [4], "v2v": [2], "t2v": [2]}
    assert all(name.startswith(f"{small_world.images}:item-") for name in entry["items"]["t2i"][0])


def test_several_bad_steps_in_a_row_end_the_run_with_one_sentence(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_bad(monkeypatch, 2, 4, 5)
    with pytest.raises(UserError, match=r"stopped at step 5, because 2 steps in a row"):
        train(small_world, tmp_path / "run", "training.guard.patience=2")
    lines = (tmp_path / "run" / BAD_BATCHES_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 5]


def test_a_save_under_way_is_made_whole_when_bad_steps_end_the_run(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_bad(monkeypatch, 5)
    write = Part.write

    def slowly(part: Part, folder: Path) -> FileRecord:
        time.sleep(0.2)
        return write(part, folder)

    monkeypatch.setattr(Part, "write", slowly)
    with pytest.raises(UserError, match=r"stopped at step 5, because the step was skipped"):
        train(
            small_world,
            tmp_path / "run",
            "training.guard.patience=1",
            "training.checkpoint_every=4",
        )
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=9)
    assert checkpoints.newest() == (checkpoints.folder / tag_of(4), [])


def test_a_step_without_sketches_is_compared_with_others_without_them(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, spikes = 40, [0, 0]
    kinds: list[bool] = []

    def mean_losses(figures: StepFigures, losses: Sequence[Loss]) -> dict[TaskName, float]:
        [task] = figures._tasks
        step = len(kinds)
        every = [task.reads_sketches(number) for number in range(steps)]
        kinds.append(every[step])
        # The last of each kind is a spike.
        spikes[:] = [max(n for n in range(steps) if every[n] == kind) for kind in (False, True)]
        return {"s2i": (0.5 if every[step] else 3.0) * (5 if step in spikes else 1)}

    monkeypatch.setattr(StepFigures, "mean_losses", mean_losses)
    train(
        small_world,
        tmp_path / "run",
        *small_world.sketch_overrides(),
        f"data.tasks={{s2i: {{corpora: ['{small_world.sketched_images}'], batch_size: 2}}}}",
        "data.caption_dropout=0.3",
        "training.guard={warm_steps: 8, window: 8}",
        f"schedule.steps={steps}",
        f"training.stop_at_step={steps}",
    )
    assert kinds.count(False) > 5
    lines = (tmp_path / "run" / BAD_BATCHES_FILE).read_text().splitlines()
    entries = {entry["step"]: entry for entry in map(json.loads, lines)}
    assert sorted(entries) == sorted(spike + 1 for spike in spikes)
    without, with_sketches = (entries[spike + 1] for spike in spikes)
    assert without["reason"] == "the loss of s2i without sketches jumped to 15.000 from about 3.000"
    assert with_sketches["reason"] == "the loss of s2i jumped to 2.500 from about 0.500"
