"""The processes of a run: who I am, on which device, and how to speak to the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_nuwa.errors import ReportedElsewhereError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's place among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the logs and the shared files."""
        return self.rank == 0

    def first_then_all(self, work: Callable[[], T]) -> T:
        """Do the same work on the first process, then on all others, and return its result.

        A `UserError` of the first ends every process, so that a mistake that all would meet is
        told once and nobody waits for a process that has left.
        """
        outcome: list[str | None] = [None]
        result: T | None = None
        if self.is_first:
            try:
                result = work()
            except UserError as error:
                outcome = [str(error)]
        if dist.is_initialized():
            dist.broadcast_object_list(outcome)
        if outcome[0] is not None:
            kind = UserError if self.is_first else ReportedElsewhereError
            raise kind(outcome[0])
        return cast(T, result) if self.is_first else work()

    def barrier(self) -> None:
        """Wait until every process is here."""
        if dist.is_initialized():
            dist.barrier()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the process group that a launcher described in the environment; alone without one.

    Uses NCCL with one GPU a process, gloo on CPUs. The group is destroyed at the end, because a
    process that exits with a live group can end with a non-zero code. A group that exists already
    is used and left alone.
    """
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    is_ours = not dist.is_initialized()
    if is_ours and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group(backend)
    elif is_ours:
        # A lone process needs no agreed port, which could collide with another run's.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, device)
    finally:
        if is_ours:
            dist.destroy_process_group()
