"""A skipped optimizer step leaves a run as if its batch had never been."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from helpers import lone_process
from torch import Tensor, nn

from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.skipping import make_skippable

BAD = 3
MICRO_BATCHES = 2
ZERO = [1, 2, 3]


class Net(nn.Module):
    """Two layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        prediction = self.layers(x.to(self.layers[0].weight.dtype))
        return (prediction.float() - y).square().mean()


class Skipper:
    """Answers what it is told, and counts how often it is asked."""

    def __init__(self) -> None:
        self.skip = False
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.skip


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}},
}


@pytest.fixture(autouse=True)
def fp16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses it there for its speed; the numbers are what matters here."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def build(dtype: str, stage: int, offload: bool = False) -> tuple[Any, Skipper]:
    lone_process()
    torch.manual_seed(0)
    model = Net()
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "train_batch_size": MICRO_BATCHES,
            "gradient_clipping": 1.0,
            "steps_per_print": 1 << 62,
            "zero_optimization": {
                "stage": stage,
                **({"offload_optimizer": {"device": "cpu"}} if offload else {}),
            },
            "zero_force_ds_cpu_optimizer": False,
            **PRECISIONS[dtype],
        },
        dist_init_required=False,
    )
    skipper = Skipper()
    make_skippable(engine, skipper)
    return engine, skipper


def train(
    dtype: str, stage: int, steps: list[int], bad_value: float = 1.0, offload: bool = False
) -> list[Tensor]:
    """The losses of all micro-batches of the good steps; the bad one is trained and skipped."""
    engine, skipper = build(dtype, stage, offload)
    losses = []
    for step in steps:
        skipper.skip = step == BAD
        skipper.asked = 0
        for part in range(MICRO_BATCHES):
            generator = torch.Generator().manual_seed(step * MICRO_BATCHES + part)
            x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator)
            loss = engine(x * (bad_value if step == BAD else 1.0), y)
            engine.backward(loss)
            engine.step()
            if step != BAD:
                losses.append(loss.detach())
        assert skipper.asked == 1
        assert engine.was_step_applied() == (step != BAD)
    assert engine.skipped_steps == (BAD in steps)
    losses.append(torch.tensor(float(engine.get_global_grad_norm() or 0)))
    losses.append(torch.tensor(float(getattr(engine.optimizer, "loss_scale", 1))))
    engine.destroy()
    return losses


@pytest.mark.parametrize("stage", ZERO)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bad_value", [1.0, float("nan")])
def test_skipped_step_is_as_if_its_batch_had_never_been(
    dtype: str, stage: int, bad_value: float
) -> None:
    skipped = train(dtype, stage, [0, 1, 2, BAD, 4, 5, 6], bad_value)
    never = train(dtype, stage, [0, 1, 2, 4, 5, 6])
    assert all(torch.isfinite(loss) for loss in skipped)
    assert torch.stack(skipped).equal(torch.stack(never))


@pytest.mark.parametrize("stage", ZERO)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_skipping_is_as_exact_with_the_optimizer_on_the_cpu(dtype: str, stage: int) -> None:
    skipped = train(dtype, stage, [0, 1, 2, BAD, 4, 5], float("nan"), offload=True)
    never = train(dtype, stage, [0, 1, 2, 4, 5], offload=True)
    assert torch.stack(skipped).equal(torch.stack(never))


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, False), (2, False), (3, False), (1, True), (2, True)]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradient_that_is_not_finite_is_dropped_without_being_told(
    dtype: str, stage: int, offload: bool
) -> None:
    engine, _ = build(dtype, stage, offload)
    x, y = torch.ones(4, 6), torch.ones(4, 3)
    for value in (1.0, 1.0, float("inf"), 1.0, 1.0, 1.0):
        loss = engine(x * value, y)
        engine.backward(loss)
        engine.step()
    assert engine.skipped_steps == 1
    assert torch.isfinite(engine(x, y))
    engine.destroy()


class Affine(nn.Linear):
    """A linear layer that reads what the layer before it wrote in another precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def square_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target).square().mean()


def train_pipeline(dtype: str, steps: list[int]) -> list[Tensor]:
    """Two stages; only the last one sees the loss, and tells the other whether to skip."""
    deepspeed = import_deepspeed()
    from deepspeed.pipe import LayerSpec, PipelineModule

    module = PipelineModule(
        [LayerSpec(Affine, 6, 8), LayerSpec(Affine, 8, 3)],
        num_stages=2,
        loss_fn=square_error,
        base_seed=0,
        seed_layers=True,
        partition_method="uniform",
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.Adam(module.parameters(), lr=0.01),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 1.0,
            "steps_per_print": 1 << 62,
            "zero_optimization": {"stage": 1},
            **PRECISIONS[dtype],
        },
        dist_init_required=False,
    )
    bad = False

    def should_skip() -> bool:
        flag = torch.tensor(int(bad and engine.is_last_stage()))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    make_skippable(engine, should_skip)
    losses = []
    for step in steps:
        bad = step == BAD
        generator = torch.Generator().manual_seed(step)
        batches = [
            (torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator))
            for _ in range(MICRO_BATCHES)
        ]
        if bad:
            batches = [(x * float("nan"), y) for x, y in batches]
        loss = engine.train_batch(iter(batches)).detach().clone()
        assert engine.was_step_applied() == (not bad)
        if not bad:
            losses.append(loss)
    return [*losses, *(p.detach().float().sum() for p in module.parameters())]


def one_stage(rank: int, port: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with join_processes():
        import_deepspeed().init_distributed()
        for dtype in ("fp32", "bf16"):
            skipped = train_pipeline(dtype, [0, 1, 2, BAD, 4, 5])
            never = train_pipeline(dtype, [0, 1, 2, 4, 5])
            same = torch.stack(skipped).equal(torch.stack(never))
            (folder / f"{dtype}.{rank}").write_text(str(same))


def test_pipeline_skips_on_all_stages_at_once(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_stage, (port, tmp_path), 2)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {f"{dtype}.{rank}": "True" for dtype in ("fp32", "bf16") for rank in (0, 1)}
