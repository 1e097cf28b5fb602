"""The ranks of a farm: MPI where a launcher started several, otherwise a lone process."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import IntEnum
from typing import Any, TypeVar, cast

from megatron_nuwa.errors import UserError, run_command

T = TypeVar("T")

# Set by Open MPI, by MPICH and Intel MPI, and by launchers that speak PMIx (Slurm's srun).
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK")
_IDLE_SECONDS = 0.002
LAUNCHER_SECONDS = 1.0


class PeerFailed(Exception):  # noqa: N818 - not an error of this rank
    """Another rank met a `UserError`, which the first rank tells."""


class MessageKind(IntEnum):
    """What ranks tell each other while they work."""

    REPORT = 1
    STOP = 2
    TASK = 3
    RESULT = 4


class Claims(ABC):
    """A counter that gives every number from 0 on to exactly one of the ranks."""

    @abstractmethod
    def claim(self) -> int:
        """The next number that nobody has."""

    @abstractmethod
    def close(self) -> None:
        """Release the counter; every rank must make this call."""


class Communicator(ABC):
    """What the farm needs of its ranks."""

    rank: int
    size: int
    # The lowest rank on this rank's machine.
    machine: int
    # Whether a thread may receive while another sends; MPI libraries can be built without it.
    receives_in_threads: bool

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank."""

    @abstractmethod
    def gather_everywhere(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""

    @abstractmethod
    def send(self, rank: int, kind: MessageKind, value: object) -> None:
        """Send a message without waiting until it is received."""

    @abstractmethod
    def is_sending(self) -> bool:
        """Whether a message sent is still on its way: it moves only while its sender asks."""

    @abstractmethod
    def receive(self, kind: MessageKind) -> tuple[int, Any] | None:
        """Sender and value of a message of this kind, or None where none has come."""

    @abstractmethod
    def claims(self) -> Claims:
        """A new counter, shared by all ranks; every rank must make this call."""

    @abstractmethod
    def ask_to_stop(self) -> None:
        """Ask the other ranks to leave their work."""

    @abstractmethod
    def is_asked_to_stop(self) -> bool:
        """Whether another rank has asked to stop."""

    @abstractmethod
    def abort(self) -> None:
        """End every rank at once: the way out of an error that the others know nothing of."""


class LoneClaims(Claims):
    """A counter of one process."""

    def __init__(self) -> None:
        self._next = 0

    def claim(self) -> int:
        self._next += 1
        return self._next - 1

    def close(self) -> None:
        return None


class LoneCommunicator(Communicator):
    """One process, without MPI."""

    rank = 0
    size = 1
    machine = 0
    receives_in_threads = False

    def broadcast(self, value: T) -> T:
        return value

    def gather_everywhere(self, value: T) -> list[T]:
        return [value]

    def send(self, rank: int, kind: MessageKind, value: object) -> None:
        raise AssertionError("a lone process has nobody to send to")

    def is_sending(self) -> bool:
        return False

    def receive(self, kind: MessageKind) -> tuple[int, Any] | None:
        return None

    def claims(self) -> Claims:
        return LoneClaims()

    def ask_to_stop(self) -> None:
        return None

    def is_asked_to_stop(self) -> bool:
        return False

    def abort(self) -> None:
        sys.exit(1)


class MpiCommunicator(Communicator):
    """The ranks of MPI's world."""

    def __init__(self) -> None:
        # Open MPI complains of its UCX windows wherever there is no UCX device. The farm's only
        # window is one counter, for which any other component will do.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
        launcher = os.getppid()
        # Imported here because the import starts MPI, which a lone process must not need.
        try:
            from mpi4py import MPI
            from mpi4py.util import pkl5
        except (ImportError, RuntimeError) as error:
            raise UserError(
                "a launcher has started this process as one of several ranks, and no MPI can be "
                f"loaded ({' '.join(str(error).split())}); install one (pip install "
                "'megatron-nuwa[mpi]' brings Open MPI), or start one process without the launcher"
            ) from error

        self._mpi = MPI
        # Arrays travel beside the pickles, not in them: no copy of a clip holds up other threads.
        self._world = pkl5.Intracomm(MPI.COMM_WORLD)
        self.rank = self._world.Get_rank()
        self.size = self._world.Get_size()
        neighbours = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self.machine = neighbours.bcast(self.rank)
        neighbours.Free()
        self.receives_in_threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._sends: list[Any] = []
        # Two threads must not ask after the same message.
        self._sends_lock = threading.Lock()
        threading.Thread(target=_end_with, args=(launcher,), name="launcher", daemon=True).start()

    def broadcast(self, value: T) -> T:
        return self._world.bcast(value)

    def gather_everywhere(self, value: T) -> list[T]:
        # A large message to a rank that has left its work would be in flight for ever, and MPI
        # could not end: everybody takes in what still comes until nobody has anything to send.
        while self.is_sending():
            self._drop_messages()
            time.sleep(_IDLE_SECONDS)
        # MPI's own waiting keeps a core busy, which the ranks still at work can use better.
        everybody = self._world.Ibarrier()
        while not everybody.Test():
            self._drop_messages()
            time.sleep(_IDLE_SECONDS)
        return self._world.allgather(value)

    def send(self, rank: int, kind: MessageKind, value: object) -> None:
        self.is_sending()
        with self._sends_lock:
            self._sends.append(self._world.isend(value, rank, kind))

    def is_sending(self) -> bool:
        with self._sends_lock:
            self._sends = [send for send in self._sends if not send.test()[0]]
            return bool(self._sends)

    def receive(self, kind: MessageKind) -> tuple[int, Any] | None:
        self.is_sending()
        status = self._mpi.Status()
        message = self._world.improbe(tag=kind, status=status)
        if message is None:
            return None
        return status.Get_source(), message.recv()

    def claims(self) -> Claims:
        return MpiClaims(self._mpi.COMM_WORLD)

    def ask_to_stop(self) -> None:
        for rank in range(self.size):
            if rank != self.rank:
                self.send(rank, MessageKind.STOP, None)

    def is_asked_to_stop(self) -> bool:
        return bool(self._world.iprobe(tag=MessageKind.STOP))

    def abort(self) -> None:
        self._world.Abort(1)

    def _drop_messages(self) -> None:
        while message := self._world.improbe():
            message.recv()


class MpiClaims(Claims):
    """A counter in the first rank's memory, which the others raise without its help."""

    def __init__(self, world: Any) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        size = MPI.INT64_T.Get_size()
        self._window = MPI.Win.Allocate(0 if world.Get_rank() else size, size, comm=world)
        if world.Get_rank() == 0:
            self._window.Lock(0)
            self._window.tomemory()[:] = bytes(size)
            self._window.Unlock(0)
        world.Barrier()

    def claim(self) -> int:
        one, before = array("q", [1]), array("q", [0])
        self._window.Lock(0, self._mpi.LOCK_SHARED)
        self._window.Fetch_and_op(
            [one, self._mpi.INT64_T], [before, self._mpi.INT64_T], 0, op=self._mpi.SUM
        )
        self._window.Unlock(0)
        return before[0]

    def close(self) -> None:
        self._window.Free()


def _end_with(launcher: int) -> None:
    """End this rank as soon as the process that has launched it is gone.

    Ranks outlive an mpirun that is killed: nobody sees them any more, the first one's death would
    not end the others, and they would write to a corpus that the next farm completes.
    """
    while os.getppid() == launcher:
        time.sleep(LAUNCHER_SECONDS)
    # As if it had been killed, too: there is nobody left to speak to.
    os._exit(1)


def join_ranks() -> Communicator:
    """The communicator that fits how this process was started.

    Raises `UserError` where it is one of several ranks, and no MPI can be loaded.
    """
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


@contextmanager
def held_on_first_rank(
    communicator: Communicator, lock: AbstractContextManager[object]
) -> Iterator[None]:
    """Hold a lock on the first rank, while all of them work; every rank must make this call."""
    own = lock if communicator.rank == 0 else nullcontext()
    on_every_rank(communicator, own.__enter__)
    try:
        yield
    finally:
        own.__exit__(None, None, None)


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
