"""What one optimizer step is made of: its learning rate, its dropout, the weights of its tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SmallWorld, lone_process
from torch import Tensor

from megatron_nuwa.data.batches import TEXT_GRID, TaskName, TokenBatch
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context
from megatron_nuwa.parallel.units import Flow
from megatron_nuwa.training.engine import StageEngine, WholeEngine
from megatron_nuwa.training.pretrain import Pretraining, pretrain
from megatron_nuwa.training.recipe import load_recipe

WEIGHTS: dict[TaskName, float] = {"t2i": 1.0, "v2v": 0.25}


def batch(task: TaskName, share: float) -> TokenBatch:
    context = Context("text", torch.zeros(1, 77, dtype=torch.int64), TEXT_GRID)
    return TokenBatch(task, context, torch.zeros(1, 4, dtype=torch.int64), Grid(2, 2, 1), share)


BATCHES = [batch("t2i", 0.6), batch("v2v", 1.0), batch("t2i", 0.4)]


def test_every_step_and_replica_has_its_own_rate_and_dropout(small_world: SmallWorld) -> None:
    recipe = load_recipe(small_world.recipe, ["schedule.steps=100", "schedule.warmup_fraction=0.1"])
    rates: list[float] = []
    seeds: list[int] = []
    engine = SimpleNamespace(
        set_rate=rates.append, train_step=lambda _batches, seed: seeds.append(seed)
    )
    for step in (0, 4, 9):
        for replica in range(4):
            run: Any = SimpleNamespace(
                recipe=recipe, step=step, place=SimpleNamespace(replica=replica), engine=engine
            )
            Pretraining._train_step(run, BATCHES)
    peak = recipe.optimizer.learning_rate
    assert rates[::4] == pytest.approx([0.1 * peak, 0.5 * peak, peak])
    assert len(set(rates)) == 3
    # Far apart, since micro-batches count on from a step's.
    ordered = sorted(seeds)
    assert all(later - earlier > 1 << 20 for earlier, later in pairwise(ordered))
    assert ordered[0] >= 0
    assert ordered[-1] < 1 << 63


class FakeDeepSpeed:
    """Losses 1, 2, 3, …; notes the order of what is asked for."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.losses: list[float] = []
        self.calls = ""

    def __call__(self, _batch: TokenBatch, seed: int) -> Tensor:
        self.calls += "f"
        self.seeds.append(seed)
        return torch.tensor(float(len(self.seeds)), requires_grad=True)

    def backward(self, loss: Tensor) -> None:
        self.calls += "b"
        self.losses.append(loss.item())

    def step(self) -> None:
        self.calls += "s"


def test_micro_batches_add_up_to_the_weighted_sum_over_tasks() -> None:
    engine = object.__new__(WholeEngine)
    deepspeed = FakeDeepSpeed()
    engine.deepspeed, engine.device = deepspeed, torch.device("cpu")
    engine._weights, engine._losses = WEIGHTS, []
    asked: list[str] = []
    engine.between = lambda: asked.append(deepspeed.calls)
    engine.train_step(BATCHES, 100)
    assert deepspeed.calls == "fbs" * 3
    # Between micro-batches, not before the first.
    assert asked == ["fbs", "fbsfbs"]
    assert deepspeed.seeds == [100, 101, 102]
    # DeepSpeed takes the mean of the micro-batches.
    assert sum(deepspeed.losses) / 3 == pytest.approx(1.0 * (0.6 * 1 + 0.4 * 3) + 0.25 * 2)
    found = [(loss.task, loss.mean.item(), loss.share) for loss in engine.losses()]
    assert found == [("t2i", 1.0, 0.6), ("v2v", 2.0, 1.0), ("t2i", 3.0, 0.4)]
    assert not any(loss.mean.requires_grad for loss in engine.losses())


def test_a_stage_packs_the_same_seeds_and_scales() -> None:
    engine = object.__new__(StageEngine)
    engine.device = torch.device("cpu")
    announced: list[Flow] = []
    traffic: Any = SimpleNamespace(announce=lambda flows, _count: announced.extend(flows))
    engine._traffic = traffic
    scales = engine._scales(BATCHES, WEIGHTS)
    assert scales == pytest.approx([1.8, 0.75, 1.2])
    packed = engine._begin(BATCHES, scales, 100, 3)
    assert [float(scale) for _, (_, scale) in packed] == pytest.approx(scales)
    assert [flow.seed for flow in announced] == [100, 101, 102]


def test_a_stage_has_its_step_on_the_device_before_it_begins() -> None:
    """`meta` stands for a GPU."""
    engine = object.__new__(StageEngine)
    engine.device = torch.device("meta")
    announced: list[Flow] = []
    traffic: Any = SimpleNamespace(announce=lambda flows, _count: announced.extend(flows))
    engine._traffic = traffic
    micro_batches = engine._begin(BATCHES, [1.0, 2.0, 3.0], 100, 3)
    tensors = [t for packed, labels in micro_batches for t in (*packed, *labels)]
    assert len(tensors) == 12
    assert {t.device.type for t in tensors} == {"meta"}
    assert {flow.x.device.type for flow in announced} == {"meta"}


class FakeStages:
    """DeepSpeed's engine of a pipeline of three micro-batches, of which this stage is the last."""

    micro_batches = 3

    def __init__(self, engine: StageEngine) -> None:
        self._engine = engine
        self.calls: list[object] = []
        self.timers: Any = lambda name: SimpleNamespace(reset=lambda: self.calls.append(name))

    def train_batch(self, micro_batches: Any) -> None:
        for (context, x, *_), (target, scale) in micro_batches:
            assert context.shape == (1, 77)
            assert x is target
            self.calls.append(self._engine._scaled_loss(torch.zeros(4), (target, scale)).item())

    def eval_batch(self, micro_batches: Any, num_micro_batches: int, **settings: Any) -> None:
        assert settings == {"reduce_output": None, "bcast_loss": False}
        self.train_batch(micro_batches)
        self.calls.append(num_micro_batches)

    def train(self) -> None:
        self.calls.append("train")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stage whose losses are 2, and what its traffic was told."""
    engine: Any = object.__new__(StageEngine)
    engine.device, engine._weights = torch.device("cpu"), WEIGHTS
    engine.deepspeed = FakeStages(engine)
    engine.model = SimpleNamespace(cross_entropy=lambda logits, target: torch.tensor(2.0))
    engine.told = []
    engine.between = lambda: engine.deepspeed.calls.append("between")
    engine._traffic = SimpleNamespace(
        announce=lambda flows, count: engine.told.append(([flow.seed for flow in flows], count))
    )

    def all_reduce(count: Tensor, operation: Any) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        # Another stage has read the data.
        count.fill_(3)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return engine


def test_a_stage_announces_its_step_and_keeps_no_timer(stage: Any) -> None:
    for _ in range(2):
        stage.deepspeed.calls.clear()
        stage.train_step(BATCHES, 100)
        assert stage.deepspeed.calls == pytest.approx([3.6, 1.5, 2.4, "train_batch"])
        # DeepSpeed adds nothing up over steps.
        found = [(loss.task, loss.mean.item(), loss.share) for loss in stage.losses()]
        assert found == [("t2i", 2.0, 0.6), ("v2v", 2.0, 1.0), ("t2i", 2.0, 0.4)]
    stage.train_step([], 100)
    assert stage.losses() == []
    assert stage.told == [([100, 101, 102], 3)] * 2 + [([], 3)]


@pytest.mark.parametrize("reads", [True, False])
def test_all_stages_evaluate_as_many_micro_batches_as_one_has_read(stage: Any, reads: bool) -> None:
    losses = stage.evaluate(BATCHES if reads else [])
    unweighted = [2.0, 2.0, 2.0] if reads else []
    assert stage.deepspeed.calls == ["between", *unweighted, 3, "train"]
    assert stage.told == [([0, 1, 2] if reads else [], 3)]
    assert [loss.task for loss in losses] == (["t2i", "v2v", "t2i"] if reads else [])


def test_what_draws_from_a_process_goes_on_after_a_resume(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, ...]] = []
    step = WholeEngine.train_step

    def drawing(engine: WholeEngine, batches: Sequence[TokenBatch], seed: int) -> None:
        drawn.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
        step(engine, batches, seed)

    def train(run: str, stop: int) -> None:
        settings = [f"run={tmp_path / run}", "evaluation=null", f"training.stop_at_step={stop}"]
        recipe = load_recipe(small_world.recipe, settings)
        pretrain(recipe, recipe.training.deepspeed_config, lone_process())

    monkeypatch.setattr(WholeEngine, "train_step", drawing)
    train("whole", 4)
    whole, drawn = drawn, []
    train("stopped", 2)
    train("stopped", 4)
    assert drawn == whole
    assert len({number for numbers in whole for number in numbers}) == 12
