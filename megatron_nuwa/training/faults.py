"""Why a process of a run ended, written down where the launcher's side finds it.

`RUN/faults/rank_00003.json` belongs to the newest start of the run. When one process fails, the
others fail too, for want of it; what they say would bury the one error that counts.
"""

from __future__ import annotations

import json
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_nuwa.errors import (
    FailedProcessError,
    MachineError,
    ReportedElsewhereError,
    UnreadableError,
    UserError,
)
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.stopping import StopRequested

FAULTS_FOLDER = "faults"
# How gloo and NCCL say that a peer is gone; they have no error class of their own for it.
_LOST = ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
# What NCCL says where the fault is the process's own.
_OWN = (
    "out of memory",
    "unhandled cuda error",
    "invalid usage",
    "invalid argument",
    "socket interface",
)
# From the one that counts most: a mistake that the user can mend, a defect, a process that does
# not go on although it waits for nobody, one that waited for others.
Kind = Literal["mistake", "error", "hang", "lost"]
_ORDER: tuple[Kind, ...] = ("mistake", "error", "hang", "lost")


@dataclass(frozen=True)
class Fault:
    """Why one process ended: a sentence, and the traceback or stack."""

    rank: int
    world_size: int
    host: str
    step: int
    kind: Kind
    sentence: str
    details: str
    time: float

    def __str__(self) -> str:
        return f"process {self.rank} on {self.host}, after step {self.step}: {self.sentence}"


def clear_faults(run: Path) -> None:
    """Forget earlier starts' faults; by one process, before the others can have any."""
    for path in (run / FAULTS_FOLDER).glob("rank_*.json"):
        path.unlink(missing_ok=True)


def read_faults(run: Path) -> list[Fault]:
    """The newest start's faults, the one that counts most and came first at the front."""
    faults = []
    for path in (run / FAULTS_FOLDER).glob("rank_*.json"):
        with suppress(OSError, ValueError, TypeError):
            faults.append(Fault(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(faults, key=lambda fault: (_ORDER.index(fault.kind), fault.time))


def cause(faults: Sequence[Fault]) -> str:
    """One sentence about why a run ended, from all that its processes wrote down."""
    if not faults:
        return "no process said why: all were killed, or failed before training began"
    if faults[0].kind != "lost":
        return str(faults[0])
    if len(faults) == faults[0].world_size:
        return (
            "no process was lost: each waited for the others, or what connects them failed; "
            f"the first to say so was {faults[0]}"
        )
    ranks = ", ".join(str(fault.rank) for fault in sorted(faults, key=lambda fault: fault.rank))
    return (
        f"a process was killed, or its node or network failed: it said nothing, and the others "
        f"(process {ranks}) lost it after step {faults[0].step}"
    )


def write_fault(
    run: Path, processes: Processes, step: int, kind: Kind, sentence: str, details: str
) -> Fault:
    """Write a process's fault down, if the disk lets it."""
    host = socket.gethostname()
    place = (processes.rank, processes.world_size, host)
    fault = Fault(*place, step, kind, sentence, details, time.time())
    with suppress(OSError):
        path = run / FAULTS_FOLDER / f"rank_{processes.rank:05d}.json"
        write_text_atomically(path, json.dumps(asdict(fault), indent=2))
    return fault


@contextmanager
def written_down(run: Path, processes: Processes, step: Callable[[], int]) -> Iterator[None]:
    """Write down and show what ends the block, before anything is taken down.

    A `UserError` is raised on, but for a storage or a machine that fails: the same start goes well
    another time. Any other exception becomes `FailedProcessError`, after its traceback was shown,
    or one line where it only says that another process is gone.
    """
    try:
        yield
    except (ReportedElsewhereError, StopRequested):
        raise
    except Exception as error:
        momentary = isinstance(error, (UnreadableError, MachineError))
        if isinstance(error, UserError) and not momentary:
            write_fault(run, processes, step(), "mistake", str(error), traceback.format_exc())
            raise
        lost = _says_that_a_peer_is_gone(error)
        sentence = f"{type(error).__name__}: {error}"
        fault = write_fault(
            run, processes, step(), "lost" if lost else "error", sentence, traceback.format_exc()
        )
        if lost:
            place = f"process {fault.rank} on {fault.host}"
            print(f"{place} ends after step {fault.step}: another one is gone", flush=True)
        else:
            traceback.print_exc()
        raise FailedProcessError(str(fault)) from error


def _says_that_a_peer_is_gone(error: Exception) -> bool:
    said = str(error)
    if isinstance(error, dist.DistError):
        return not any(word in said.lower() for word in _OWN)
    return isinstance(error, RuntimeError) and any(word in said for word in _LOST)
