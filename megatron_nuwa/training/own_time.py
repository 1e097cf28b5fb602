"""How long this process itself computes, and which processes are slower than their peers."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from megatron_nuwa.training.processes import Processes

# A process that takes this much longer than the median of its peers is named.
STRAGGLER_RATIO = 1.3


class OwnTime:
    """Seconds in the training forward passes of a module, the same share of work on all peers.

    A step lasts equally long on all processes, since they wait for each other; its forward passes
    wait for nobody where the weights are whole (no tensor parallelism, no ZeRO 3).
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._begun = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        seconds, self._seconds = self._seconds, 0.0
        if self._events:
            self._events[-1][1].synchronize()
            seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        return seconds

    def _begin(self, module: nn.Module, arguments: object) -> None:
        if module.training and self._on_gpu:
            self._events.append(
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            )
            self._events[-1][0].record()
        self._begun = time.perf_counter()

    def _end(self, module: nn.Module, arguments: object, result: object) -> None:
        if module.training and self._on_gpu:
            self._events[-1][1].record()
        elif module.training:
            self._seconds += time.perf_counter() - self._begun


class Stragglers:
    """Compares every process's own time with the median of the processes that do the same work.

    `stage` is the process's pipeline stage, whose peers are the processes of that stage. Making one
    and comparing are collective.
    """

    def __init__(self, processes: Processes, stage: int = 0) -> None:
        self._processes, self._stage = processes, stage
        self._hosts: list[str] = [""] * processes.world_size
        dist.all_gather_object(self._hosts, socket.gethostname())

    def compare(self, seconds: float) -> list[float]:
        """For each rank its own time over the median of its peers; 1 where nothing was timed."""
        own = torch.tensor([seconds, self._stage], dtype=torch.float64)
        every = torch.zeros(self._processes.world_size, 2, dtype=torch.float64)
        every[self._processes.rank] = own
        every = every.to(self._processes.device)
        dist.all_reduce(every)
        return ratios_to_peers(every[:, 0].tolist(), every[:, 1].int().tolist())

    def names(self, ratios: Sequence[float], steps: int) -> list[str]:
        """One phrase for each rank that is too slow."""
        return [
            f"rank {rank} on host {self._hosts[rank]}: {ratio:.1f}× the median over {steps} steps"
            for rank, ratio in enumerate(ratios)
            if ratio > STRAGGLER_RATIO
        ]


def ratios_to_peers(seconds: Sequence[float], stages: Sequence[int]) -> list[float]:
    """Each time over the median of those with the same stage."""
    medians = {
        stage: median(s for s, of in zip(seconds, stages, strict=True) if of == stage)
        for stage in set(stages)
    }
    return [
        own / medians[stage] if medians[stage] else 1.0
        for own, stage in zip(seconds, stages, strict=True)
    ]
