"""The ranks of a farm: MPI where a launcher started several, otherwise a lone process."""

from __future__ import annotations

import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar, cast

from megatron_nuwa.errors import UserError, run_command

T = TypeVar("T")

# Set by Open MPI, by MPICH and Intel MPI, and by launchers that speak PMIx (Slurm's srun).
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK")


class PeerFailed(Exception):  # noqa: N818 - not an error of this rank
    """Another rank met a `UserError`, which the first rank tells."""


class Communicator(ABC):
    """What the farm needs of its ranks."""

    rank: int
    size: int

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank."""

    @abstractmethod
    def gather_everywhere(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""

    @abstractmethod
    def report(self, items: int) -> None:
        """Tell the first rank, without waiting, that so many more items are done."""

    @abstractmethod
    def reported(self) -> int:
        """On the first rank: items that the others have reported since the last call."""

    @abstractmethod
    def ask_to_stop(self) -> None:
        """Ask the other ranks to leave their work."""

    @abstractmethod
    def is_asked_to_stop(self) -> bool:
        """Whether another rank has asked to stop."""

    @abstractmethod
    def abort(self) -> None:
        """End every rank at once: the way out of an error that the others know nothing of."""


class LoneCommunicator(Communicator):
    """One process, without MPI."""

    rank = 0
    size = 1

    def broadcast(self, value: T) -> T:
        return value

    def gather_everywhere(self, value: T) -> list[T]:
        return [value]

    def report(self, items: int) -> None:
        raise AssertionError("a lone process has nobody to report to")

    def reported(self) -> int:
        return 0

    def ask_to_stop(self) -> None:
        return None

    def is_asked_to_stop(self) -> bool:
        return False

    def abort(self) -> None:
        sys.exit(1)


class MpiCommunicator(Communicator):
    """The ranks of MPI's world."""

    _REPORT = 1
    _STOP = 2

    def __init__(self) -> None:
        # Imported here because the import starts MPI, which a lone process must not need.
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self.rank = self._world.Get_rank()
        self.size = self._world.Get_size()
        self._sends: list[Any] = []

    def broadcast(self, value: T) -> T:
        return self._world.bcast(value)

    def gather_everywhere(self, value: T) -> list[T]:
        # MPI's own waiting keeps a core busy, which the ranks still at work can use better.
        everybody = self._world.Ibarrier()
        while not everybody.Test():
            time.sleep(0.005)
        return self._world.allgather(value)

    def report(self, items: int) -> None:
        self._send(items, 0, self._REPORT)

    def reported(self) -> int:
        items = 0
        while self._world.iprobe(tag=self._REPORT):
            items += self._world.recv(tag=self._REPORT)
        return items

    def ask_to_stop(self) -> None:
        for rank in range(self.size):
            if rank != self.rank:
                self._send(None, rank, self._STOP)

    def is_asked_to_stop(self) -> bool:
        return bool(self._world.iprobe(tag=self._STOP))

    def abort(self) -> None:
        self._world.Abort(1)

    def _send(self, value: object, rank: int, tag: int) -> None:
        self._sends = [send for send in self._sends if not send.test()[0]]
        self._sends.append(self._world.isend(value, rank, tag))


def join_ranks() -> Communicator:
    """The communicator that fits how this process was started."""
    if any(name in os.environ for name in LAUNCHER_VARIABLES):
        return MpiCommunicator()
    return LoneCommunicator()


def on_every_rank(communicator: Communicator, action: Callable[[], T]) -> T:
    """Run an action on all ranks; a `UserError` of one ends all.

    The first rank then raises it, the others raise `PeerFailed`. Every rank must make this call.
    """
    result: T | None = None
    error: UserError | None = None
    try:
        result = action()
    except UserError as met:
        error = met
        communicator.ask_to_stop()
    errors = [text for text in communicator.gather_everywhere(error and str(error)) if text]
    if errors:
        raise UserError(errors[0]) if communicator.rank == 0 else PeerFailed
    return cast(T, result)


def on_first_rank(communicator: Communicator, action: Callable[[], T]) -> T:
    """Run an action on the first rank and give its result to all; a `UserError` ends all."""
    first = communicator.rank == 0
    return communicator.broadcast(
        on_every_rank(communicator, lambda: cast(T, action() if first else None))
    )


def run_ranks(communicator: Communicator, main: Callable[[], int | None]) -> int:
    """Run a command on all ranks and return this rank's exit code.

    The first rank tells a `UserError`. Any other exception shows its traceback and ends the whole
    job, since the other ranks would otherwise wait for this one for ever.
    """
    try:
        return run_command(main)
    except PeerFailed:
        return 2
    except Exception:
        print(f"rank {communicator.rank} of {communicator.size} failed:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        communicator.abort()
        return 1
