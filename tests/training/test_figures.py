"""Figures are means over everything that was trained, and say who and what was slow or skipped."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing
from helpers import SmallWorld, lone_process
from torch import Tensor, nn

from megatron_nuwa.data.batches import TaskBatches
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.flops import training_flops
from megatron_nuwa.training import figures as room
from megatron_nuwa.training import pretrain as pretraining
from megatron_nuwa.training.engine import Loss
from megatron_nuwa.training.figures import StepFigures
from megatron_nuwa.training.own_time import ratios_to_peers
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.processes import Processes, join_processes
from megatron_nuwa.training.recipe import load_recipe

RANKS = 3
LAST_STAGE = 1
SECONDS = [0.01, 0.05, 0.25]


def figures_of(
    recipe_path: Path, processes: Processes, stage: int = 0, overrides: Sequence[str] = ()
) -> StepFigures:
    recipe = load_recipe(recipe_path, overrides)
    assert recipe.data is not None
    assert recipe.tokenizers is not None
    bpe = TextTokenizer.load(recipe.tokenizers.bpe)
    tasks = {
        task: TaskBatches(
            task,
            [Corpus(s.corpora[0])],
            bpe,
            seed=0,
            batch_size=s.batch_size,
            caption_dropout=recipe.data.caption_dropout,
        )
        for task, s in recipe.data.tasks.items()
    }
    return StepFigures(recipe, tasks, processes, stage)


class Sleeper(nn.Module):
    """A model that takes its time."""

    def forward(self, seconds: float) -> None:
        time.sleep(seconds)


def loss_of(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.bfloat16)


def one_rank(rank: int, port: int, recipe: Path, folder: Path) -> None:
    """Rank 0 is a pipeline's first stage and computes no loss; 1 and 2 are replicas of its last."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    of_rank: list[list[Loss]] = [
        [],
        [("t2i", loss_of(1), 0.25), ("v2v", loss_of(3), 1.0), ("t2i", loss_of(2), 0.75)],
        [("t2i", loss_of(5), 1.0), ("v2v", loss_of(4), 1.0)],
    ]
    with join_processes() as processes:
        figures = figures_of(recipe, processes, stage=min(rank, LAST_STAGE))
        model = Sleeper()
        figures.watch(model)
        model(SECONDS[rank])
        means = figures.mean_losses(of_rank[rank])
        figures.add_wait(rank)
        with patch.object(room, "allocated_gib", lambda device: 7 - rank):
            figures.add(means)
            values = figures.take(1, 0.5, 1e-3)
        bad = figures.mean_losses([("t2i", loss_of(math.nan if rank == 2 else 1), 1.0)])
        result = {"means": means, "slow": figures.stragglers(), "values": values, "bad": bad}
        (folder / f"{rank}.json").write_text(json.dumps(result))


def test_means_and_stragglers_are_right_on_every_process_of_a_pipeline(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_rank, (port, small_world.recipe, tmp_path), RANKS)
    for rank in range(RANKS):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["means"] == {"t2i": (0.25 * 1 + 0.75 * 2 + 5) / 2, "v2v": 3.5}
        assert math.isnan(result["bad"]["t2i"])
        [phrase] = result["slow"]
        assert phrase.startswith(f"rank 2 on host {socket.gethostname()}: 1.")
        assert phrase.endswith("× the median over 1 steps")
        assert 1.4 < result["values"]["speed/step_seconds_spread"] < 1.8
        values = result["values"]
        assert values["train/loss/t2i"] == 3.375
        # Of the process that has most of it.
        waited = values["speed/data_wait_fraction"] * values["speed/step_seconds"]
        assert waited == pytest.approx(RANKS - 1)
        assert values["memory/allocated_gib"] == 7


def test_the_time_of_a_step_has_in_it_what_is_waited_for_when_it_ends(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the optimizer's update is only queued before; the processes' agreement waits."""
    agree, waits = Processes.agree, [0.3, 0.5, 0.4]

    def on_gpu(processes: Processes, values: Sequence[int]) -> list[int]:
        # The one at the end of a step.
        if len(values) == 3:
            time.sleep(waits[0] if len(waits) == 1 else waits.pop(0))
        return agree(processes, values)

    monkeypatch.setattr(Processes, "agree", on_gpu)
    run = tmp_path / "run"
    overrides = ("evaluation=null", "training.stop_at_step=3", "training.log_every=2")
    recipe = load_recipe(small_world.recipe, [f"run={run}", *overrides])
    pretrain(recipe, recipe.training.deepspeed_config, lone_process())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    two, last = (line["speed/step_seconds"] for line in lines if "speed/step_seconds" in line)
    assert two > 0.4
    assert last > 0.4


def test_the_loading_of_a_checkpoint_is_no_step_s_time(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, load = tmp_path / "run", pretraining.load

    def slowly(*arguments: Any) -> None:
        time.sleep(3)
        load(*arguments)

    monkeypatch.setattr(pretraining, "load", slowly)
    for last in (1, 2):
        overrides = ("evaluation=null", f"training.stop_at_step={last}")
        recipe = load_recipe(small_world.recipe, [f"run={run}", *overrides])
        pretrain(recipe, recipe.training.deepspeed_config, lone_process())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines[1]["speed/step_seconds"] < 3


def test_peers_are_those_of_the_same_stage() -> None:
    assert ratios_to_peers([1, 1, 1, 3, 3, 6], [0, 0, 0, 1, 1, 1]) == [1, 1, 1, 1, 1, 2]
    assert ratios_to_peers([1, 5], [0, 1]) == [1, 1]
    assert ratios_to_peers([0, 0], [0, 0]) == [1, 1]


def test_skipped_steps_are_counted_and_leave_the_means_alone(small_world: SmallWorld) -> None:
    figures = figures_of(small_world.recipe, lone_process())
    losses = {"t2i": 2.0, "v2v": 3.0, "t2v": 4.0}
    figures.add(losses)
    figures.add_skipped()
    figures.add({task: loss + 1 for task, loss in losses.items()})
    values = figures.take(3, 0.5, 1e-3)
    assert [values[f"train/loss/{task}"] for task in losses] == [2.5, 3.5, 4.5]
    assert values["train/perplexity/t2i"] == pytest.approx(math.exp(2.5))
    assert values["speed/skipped_steps"] == 1
    assert values["speed/step_seconds_spread"] == 1
    assert "train/loss_scale" not in values
    assert figures.line(3, 9, values).endswith("  skipped 1")
    assert figures.stragglers() == []


def test_interval_of_skipped_steps_alone_has_no_loss_and_still_a_line(
    small_world: SmallWorld,
) -> None:
    figures = figures_of(small_world.recipe, lone_process())
    figures.add_skipped()
    values = figures.take(1, math.inf, 1e-3, loss_scale=256.0)
    assert not [tag for tag in values if tag.startswith(("train/loss/", "train/grad"))]
    assert "train/loss" not in values
    assert values["train/loss_scale"] == 256
    json.dumps(values, allow_nan=False)
    assert figures.line(1, 9, values).startswith("step 1/9  lr 1.00e-03  ")


def test_healthy_line_says_nothing_of_skipping(small_world: SmallWorld) -> None:
    figures = figures_of(small_world.recipe, lone_process())
    figures.add({"t2i": 2.0, "v2v": 3.0, "t2v": 4.0})
    line = figures.line(1, 9, figures.take(1, 0.5, 1e-3))
    assert "loss 9.0000 (t2i 2.000 t2v 4.000 v2v 3.000)" in line
    assert "skipped" not in line


def test_only_training_is_watched(small_world: SmallWorld) -> None:
    figures = figures_of(small_world.recipe, lone_process())
    model = Sleeper()
    figures.watch(model)
    assert figures._own_time is not None
    model.eval()
    model(0.02)
    assert figures._own_time.take() == 0
    model.train()
    model(0.02)
    assert figures._own_time.take() >= 0.02
    assert figures._own_time.take() == 0


def test_flops_are_those_of_what_the_encoder_read_in_each_step(small_world: SmallWorld) -> None:
    overrides = [*small_world.sketch_overrides("s2v"), "data.caption_dropout=0.4"]
    recipe = load_recipe(small_world.recipe, overrides)
    assert recipe.model is not None
    figures = figures_of(small_world.recipe, lone_process(), overrides=overrides)
    read = next(task for task in figures._tasks if task.task == "s2v")
    assert {read.reads_sketches(step) for step in range(20)} == {False, True}
    text, clip, image = Grid(1, 1, 77), Grid(4, 4, 3), Grid(4, 4, 1)
    always = 4 * training_flops(recipe.model, "text", text, image)
    always += 4 * training_flops(recipe.model, "text", text, clip)
    of_sketch = 2 * training_flops(recipe.model, "sketch", clip, clip)
    of_text = 2 * training_flops(recipe.model, "text", text, clip)
    assert of_sketch != of_text
    for step in range(20):
        own = of_sketch if read.reads_sketches(step) else of_text
        assert figures._flops(range(step, step + 1)) == always + own
