"""What a pipeline's stages tell each other beside their messages, by an engine that sends none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nuwa.grid import Grid
from megatron_nuwa.parallel.pipeline import Traffic
from megatron_nuwa.parallel.units import NOTES, Flow

CPU = torch.device("cpu")
Heard = tuple[Tensor, ...]


def flow(samples: int = 2, seed: int = 0, frames: int = 3, masked: bool = True) -> Flow:
    """A micro-batch after its embedding."""
    mask = torch.zeros(samples, 5, dtype=torch.bool) if masked else None
    context, x = torch.zeros(samples, 5, 4), torch.zeros(samples, 4 * frames, 4)
    return Flow(context, x, mask, "text", Grid(1, 1, 5), Grid(2, 2, frames), seed)


class Engine:
    """DeepSpeed's engine of one stage; both ways of shapes are noted."""

    def __init__(self, is_first: bool) -> None:
        self.is_first_stage = lambda: is_first
        self.grid = self.module = self
        self.notes: Any = None
        self.told: list[Heard] = []
        # What the stage before would send, in its order.
        self.coming: list[Heard] = []
        self.heard = 0
        self._send_tensor_meta: Any = lambda message, _stage: self.told.append(message)
        self._recv_tensor_meta: Any = self._hear

    def stage_to_global(self, stage: int) -> int:
        assert stage == 0
        return 5

    def get_pipe_parallel_group(self) -> str:
        return "pipeline"

    def _hear(self, stage: int) -> Heard:
        assert stage == 1
        self.heard += 1
        return tuple(torch.full_like(tensor, self.heard) for tensor in self.coming[0])


@pytest.fixture
def broadcast(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the first stage tells, and the others then get."""
    told: list[Tensor] = []

    def send(tensor: Tensor, source: int, group: Any) -> None:
        assert (source, group, tensor.dtype) == (5, "pipeline", torch.int64)
        if told:
            tensor.copy_(told[0])
        else:
            told.append(tensor)

    monkeypatch.setattr(dist, "broadcast", send)
    return told


STEP = [flow(), flow(seed=1), flow(frames=2), flow(samples=1, seed=3), flow(masked=False), flow()]


@pytest.mark.usefixtures("broadcast")
def test_all_stages_know_the_micro_batches_of_a_step() -> None:
    for is_first in (True, False):
        engine = Engine(is_first)
        Traffic(engine, CPU).announce(STEP if is_first else [], len(STEP))
        notes = list(engine.notes)
        assert notes == [flow.notes for flow in STEP]
        assert {len(note) for note in notes} == {NOTES}


@pytest.mark.usefixtures("broadcast")
def test_shapes_are_told_and_heard_once_and_messages_need_no_more() -> None:
    engine = Engine(is_first=True)
    traffic = Traffic(engine, CPU)
    expected = [flow.pack() for flow in STEP]
    for step in range(2):
        # Each of the two ways has its own order: backward follows forward.
        traffic.announce(STEP, len(STEP))
        for message in expected:
            engine._send_tensor_meta(message, 1)
        buffers = []
        for message in expected:
            engine.coming = [message]
            buffers.append(engine._recv_tensor_meta(1))
        assert engine.told == [expected[0], *expected[2:5]]
        assert engine.heard == 4
        for found, message in zip(buffers, expected, strict=True):
            assert [(b.shape, b.dtype) for b in found] == [(t.shape, t.dtype) for t in message]
        # Messages in flight share no memory.
        places = [buffer.data_ptr() for found in buffers for buffer in found]
        assert len(set(places)) == len(places), step


def test_a_buffer_is_made_as_it_is_asked_for() -> None:
    engine: Any = Engine(is_first=True)
    Traffic(engine, CPU)
    buffer = engine._allocate_or_extend_buffers(3, [2, 3], torch.bfloat16)
    assert (buffer.shape, buffer.dtype) == ((2, 3), torch.bfloat16)
