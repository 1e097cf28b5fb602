"""How starting weights are drawn."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from megatron_nuwa.models import initialisation
from megatron_nuwa.models.initialisation import initialise


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no process is bound to cores")
def test_weights_are_drawn_on_the_cores_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processes of a node would else start a node's threads each."""
    started: list[int] = []

    def pool(threads: int) -> ThreadPoolExecutor:
        started.append(threads)
        return ThreadPoolExecutor(threads)

    monkeypatch.setattr(initialisation, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    drawn = []
    for cores in ({5}, {1, 2, 3}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        layer = nn.Linear(4, 4)
        initialise(layer.named_parameters(), seed=1, depth=1, deviation=0.1)
        drawn.append(layer.weight.detach())
    assert started == [1, 3]
    assert torch.equal(*drawn)
