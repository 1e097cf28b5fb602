"""The streamlined bf16 optimizer of DeepSpeed takes the very steps that it takes by itself."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import lone_process
from torch import Tensor, nn

from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.training.bf16_optimizer import streamline
from megatron_nuwa.training.building import complete_config
from megatron_nuwa.training.launcher import free_port
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.recipe import Recipe

MICRO_BATCHES = 3
LAYOUT: dict[str, Any] = {
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True, "immediate_grad_update": True},
    "data_types": {"grad_accum_dtype": "fp32"},
}


class Net(nn.Module):
    """A layer that is used twice, one that is used once, and one that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.never = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.once(torch.tanh(self.twice(torch.tanh(self.twice(x))))).float().square().mean()


def start(layout: dict[str, Any], clipping: float, replicas: int, streamlined: bool) -> Any:
    torch.manual_seed(0)
    model = Net()
    recipe = Recipe(name="net", optimizer={"gradient_clipping": clipping})
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        config=complete_config(layout, MICRO_BATCHES, replicas, recipe),
        dist_init_required=False,
    )
    if streamlined:
        streamline(engine.optimizer, norm_at_once=True)
    return engine


def train(clipping: float, immediate: bool, streamlined: bool) -> tuple[list[float], list[Tensor]]:
    """Gradient norms of four steps, and the fp32 weights after them."""
    lone_process()
    bf16 = {"enabled": True, "immediate_grad_update": immediate}
    engine = start({**LAYOUT, "bf16": bf16}, clipping, 1, streamlined)
    generator, norms = torch.Generator().manual_seed(1), []
    for number in range(4 * MICRO_BATCHES):
        loss = engine(torch.randn(7, 5, generator=generator).bfloat16())
        # The third step is dropped.
        engine.backward(loss * (float("inf") if number == 2 * MICRO_BATCHES else 1.0))
        engine.step()
        if (number + 1) % MICRO_BATCHES == 0:
            norms.append(float(engine.get_global_grad_norm()))
    assert engine.skipped_steps == 1
    return norms, [w.clone() for w in engine.optimizer.fp32_groups_flat_partition]


@pytest.mark.parametrize("immediate", [True, False])
def test_steps_are_the_same(immediate: bool) -> None:
    norms, weights = train(0.0, immediate, streamlined=False)
    new_norms, new_weights = train(0.0, immediate, streamlined=True)
    assert new_norms == pytest.approx(norms, rel=1e-6)
    assert all(map(torch.equal, new_weights, weights))


def test_clipping_is_the_same() -> None:
    norms, weights = train(0.05, True, streamlined=False)
    assert min(norms) > 0.05
    new_norms, new_weights = train(0.05, True, streamlined=True)
    assert new_norms == pytest.approx(norms, rel=1e-6)
    for new, weight in zip(new_weights, weights, strict=True):
        torch.testing.assert_close(new, weight, rtol=1e-5, atol=1e-7)


def test_other_optimizers_are_left_alone() -> None:
    plain: Any = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    before = dict(vars(plain))
    streamline(plain, norm_at_once=True)
    assert vars(plain) == before


@pytest.mark.parametrize("norm_at_once", [True, False])
def test_gradients_are_measured_where_they_lie(norm_at_once: bool) -> None:
    flat = [torch.zeros(4), torch.zeros(2)]
    optimizer: Any = SimpleNamespace(fp32_groups_gradients_flat=flat)
    streamline(optimizer, norm_at_once)
    assert hasattr(optimizer, "get_grads_for_norm") == norm_at_once
    if norm_at_once:
        assert optimizer.get_grads_for_norm()[0] is flat
        assert optimizer.get_grads_for_norm(for_clipping=True) is flat


def summed_gradients(engine: Any, seed: int) -> Tensor:
    """The fp32 gradients after the last micro-batch of a step, summed over the replicas."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(MICRO_BATCHES):
        loss = engine(torch.randn(7, 5, generator=generator).bfloat16())
        engine.backward(loss)
        if number + 1 < MICRO_BATCHES:
            engine.step()
    return torch.cat([flat.clone() for flat in engine.optimizer.fp32_groups_gradients_flat])


def share_of_bf16_numbers(gradients: Tensor) -> float:
    changed = gradients[gradients != 0]
    return float((changed.bfloat16().float() == changed).float().mean())


def one_replica(rank: int, port: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with join_processes():
        import_deepspeed().init_distributed()
        dtypes, all_reduce = set(), dist.all_reduce

        def watched(tensor: Tensor, *args: Any, **settings: Any) -> Any:
            dtypes.add(tensor.dtype)
            return all_reduce(tensor, *args, **settings)

        dist.all_reduce = watched
        both = summed_gradients(start(LAYOUT, 0.0, 2, streamlined=True), seed=rank)
        plain = summed_gradients(start(LAYOUT, 0.0, 2, streamlined=False), seed=rank)
        dist.all_reduce = all_reduce
        torch.save((both, plain, dtypes), folder / str(rank))


def test_replicas_are_summed_in_fp32(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_replica, (free_port(), tmp_path), 2)
    (first, plain, dtypes), (second, *_) = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    assert dtypes == {torch.float32}
    assert first.equal(second)
    assert first.equal(plain)
    lone_process()
    alone = [summed_gradients(start(LAYOUT, 0.0, 1, streamlined=True), rank) for rank in (0, 1)]
    size = min(len(first), len(alone[0]))
    torch.testing.assert_close(first[:size], (alone[0] + alone[1])[:size] / 2, rtol=1e-6, atol=1e-9)
    assert not first[size:].any()
    assert share_of_bf16_numbers(first) < 0.5


def test_a_layout_may_ask_for_sums_in_bf16() -> None:
    lone_process()
    layout = {**LAYOUT, "communication_data_type": "bf16"}
    gradients = summed_gradients(start(layout, 0.0, 1, streamlined=True), seed=0)
    assert share_of_bf16_numbers(gradients) == 1.0
