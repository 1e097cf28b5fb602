"""The streamlined bf16 optimizer of DeepSpeed takes the very steps that it takes by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import lone_process
from torch import Tensor, nn

from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.training.bf16_optimizer import streamline

MICRO_BATCHES = 3


class Net(nn.Module):
    """A layer that is used twice, one that is used once, and one that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.never = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.once(torch.tanh(self.twice(torch.tanh(self.twice(x))))).float().square().mean()


def train(clipping: float, immediate: bool, streamlined: bool) -> tuple[list[float], list[Tensor]]:
    """Gradient norms of four steps, and the fp32 weights after them."""
    lone_process()
    torch.manual_seed(0)
    model = Net()
    bf16 = {"enabled": True, "immediate_grad_update": immediate}
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "train_batch_size": MICRO_BATCHES,
            "gradient_clipping": clipping,
            "steps_per_print": 1 << 62,
            "zero_optimization": {"stage": 1},
            "bf16": bf16,
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        dist_init_required=False,
    )
    if streamlined:
        streamline(engine.optimizer, norm_at_once=True)
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
