"""The processes of a run: who I am, on which device, and how to speak to the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.training.launcher import adopt_launcher_environment

T = TypeVar("T")
# How long the first process waits for the others to start, and they for it.
_PATIENCE = timedelta(minutes=10)


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

        A `UserError` of any process ends them all, so that a mistake that all would meet is told
        once and nobody waits for a process that has left.
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
        failure = None
        if not self.is_first:
            try:
                result = work()
            except UserError as error:
                failure = f"{socket.gethostname()}, process {self.rank}: {error}"
        self.raise_first(failure)
        return cast(T, result)

    def first_tells(self, work: Callable[[], T]) -> T:
        """Do work on the first process alone, and return its result on every process."""
        outcome: list[Any] = [work() if self.is_first else None]
        if dist.is_initialized():
            dist.broadcast_object_list(outcome)
        return cast(T, outcome[0])

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks, on every process."""
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agree(self, values: Sequence[int]) -> list[int]:
        """The largest value of any process at each place; every process must call it."""
        if not dist.is_initialized():
            return list(values)
        agreed = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return [int(value) for value in agreed.tolist()]

    def raise_first(self, failure: str | None) -> None:
        """End every process if any of them brings a failure; the lowest rank's is told once."""
        failures = [text for text in self.gather(failure) if text is not None]
        if failures:
            raise (UserError if self.is_first else ReportedElsewhereError)(failures[0])

    def barrier(self) -> None:
        """Wait until every process is here."""
        if dist.is_initialized():
            dist.barrier()


@contextmanager
def join_processes(patience: timedelta = _PATIENCE) -> Iterator[Processes]:
    """Join the process group that a launcher described in the environment; alone without one.

    The launchers are deepspeed, torchrun, OpenMPI's mpirun and Slurm's srun. Uses NCCL with one
    GPU a process, gloo on CPUs. The group is destroyed at the end, because a process that exits
    with a live group can end with a non-zero code. A group that exists already is used and left
    alone. Raises `UserError` where the port is taken, where the others do not come within
    `patience`, and where a process has no GPU of its own.
    """
    adopt_launcher_environment()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    local_rank = int(os.environ["LOCAL_RANK"])
    device, backend = _device_and_backend(local_rank)
    is_ours = not dist.is_initialized()
    if is_ours and int(os.environ["WORLD_SIZE"]) > 1:
        # Imported while a group exists, it holds on to that for ever; gloo's threads then outlive
        # `destroy_process_group` and abort the process now and then when the interpreter ends.
        import_deepspeed()
        dist.init_process_group(
            backend,
            store=_meet(patience),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    elif is_ours:
        # A lone process needs no agreed port, which could collide with another run's.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, device)
    finally:
        if is_ours:
            dist.destroy_process_group()


def _device_and_backend(local_rank: int) -> tuple[torch.device, str]:
    if not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of {socket.gethostname()} sees only {count} GPUs: start as many "
            "processes a node as it has GPUs, and let each see them all (Slurm: --gpus-per-node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device, "nccl"


def _meet(patience: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT through which the processes find one another."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"{place} (MASTER_ADDR:MASTER_PORT) is in use by another program: pass another "
                "port with deepspeed --master_port, or set MASTER_PORT"
            ) from error
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes did not meet at {place} "
            f"(MASTER_ADDR:MASTER_PORT) within {patience.total_seconds():.0f} s: see whether one "
            "of them failed to start, whether a firewall stands between the nodes, and whether "
            "another port (deepspeed --master_port) is free"
        ) from error
    store.set_timeout(dist.default_pg_timeout)
    return dist.PrefixStore("default_pg", store)
