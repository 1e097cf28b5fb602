"""The processes of a run: who I am, on which device, and how to speak to the others."""

from __future__ import annotations

import os
import socket
import time
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
from megatron_nuwa.training.meeting import choose_device, choose_device_together, meet

T = TypeVar("T")
# How long the first process waits for the others to start, and they for it.
_PATIENCE = timedelta(minutes=10)
# How often processes that wait for the first one's work hear from it.
_TURN_SECONDS = 5.0
_NCCL_MONITOR = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"


@dataclass(frozen=True)
class Processes:
    """This process's place among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    def __str__(self) -> str:
        number = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        if self.device.type == "cpu":
            return f"{number} on the CPU"
        each = "each on a GPU" if self.world_size > 1 else "on a GPU"
        return f"{number}, {each} ({torch.cuda.get_device_name(self.device)})"

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

    def first_works(self, work: Callable[[Callable[[], None]], T], turn: Callable[[], None]) -> T:
        """Do long work on the first process alone, and return its result on every process.

        `work` calls its argument often; every few seconds that has all processes take a `turn`
        together, so that none waits long enough to be given up, and what a turn raises on all of
        them ends the work. A `UserError` of the work ends them all; on the first process it is the
        same one.
        """
        failure: UserError | None = None
        result: T | None = None
        if self.is_first:
            last = time.monotonic()

            def go_on() -> None:
                nonlocal last
                if time.monotonic() - last >= _TURN_SECONDS:
                    self.agree([0])
                    turn()
                    last = time.monotonic()

            try:
                result = work(go_on)
            except UserError as error:
                failure = error
            self.agree([1])
        else:
            while not self.agree([0])[0]:
                turn()
        told = self.first_tells(lambda: None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if told is not None:
            raise ReportedElsewhereError(told)
        return cast(T, self.first_tells(lambda: result))

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
def join_processes(
    patience: timedelta = _PATIENCE, timeout: timedelta | None = None
) -> Iterator[Processes]:
    """Join the process group that a launcher described in the environment; alone without one.

    The launchers are deepspeed, torchrun, OpenMPI's mpirun and Slurm's srun. Uses NCCL with one
    GPU a process, gloo on CPUs. `timeout` is how long a collective of any group may wait before
    the backend ends the process (default: torch's). The group is destroyed at the end, because a
    process that exits with a live group can end with a non-zero code; an exception leaves NCCL's to
    the end of the process. A group that exists already is used and left alone.

    Raises `UserError` where the port is taken, where the others do not come within `patience` or
    have another kind of device, and where a process has no GPU of its own.
    """
    adopt_launcher_environment()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    if dist.is_initialized():
        device = choose_device(local_rank)
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, device)
        return
    store: dist.Store
    if world_size > 1:
        # Imported while a group exists, it holds on to that for ever; gloo's threads then outlive
        # `destroy_process_group` and abort the process now and then when the interpreter ends.
        import_deepspeed()
        meeting = meet(patience)
        device = choose_device_together(meeting, rank, world_size, local_rank, patience)
        # NCCL's communicators are made at their first use, through the store.
        meeting.set_timeout(timeout or dist.default_pg_timeout)
        store = dist.PrefixStore("default_pg", meeting)
    else:
        # A lone process needs no agreed port, which could collide with another run's.
        device, rank, store = choose_device(local_rank), 0, dist.HashStore()
    with _patient_backends(timeout):
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        try:
            yield Processes(rank, world_size, local_rank, device)
        except BaseException:
            # NCCL would wait here for collectives that the others may never join.
            if backend != "nccl":
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


@contextmanager
def _patient_backends(timeout: timedelta | None) -> Iterator[None]:
    """Give every group that is made in the block this time-out.

    DeepSpeed makes its groups without naming one, so the defaults that torch looks up are changed.
    """
    if timeout is None:
        yield
        return
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    usual = {name: getattr(dist.distributed_c10d, name) for name in names}
    monitor = os.environ.get(_NCCL_MONITOR)
    if monitor is None:
        # NCCL's monitor ends the process, too, when a call of CUDA's does not come back.
        os.environ[_NCCL_MONITOR] = str(int(timeout.total_seconds()))
    for name in names:
        setattr(dist.distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in usual.items():
            setattr(dist.distributed_c10d, name, value)
        if monitor is None:
            os.environ.pop(_NCCL_MONITOR, None)
