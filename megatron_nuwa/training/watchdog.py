"""Ending a process that makes no progress, so that a hung run does not hold its nodes for ever."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from megatron_nuwa.training.faults import Kind, write_fault
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.roll_call import RollCall
from megatron_nuwa.training.stopping import StopSignals

# Reading a large checkpoint over a slow file system may take longer than any step.
START_SECONDS = 1800.0
# Whoever is in there waits for other processes.
_WAITING = (f"{os.sep}torch{os.sep}distributed", f"{os.sep}deepspeed{os.sep}comm")
# A disk or a console that hangs must not keep the process alive.
_REPORT_SECONDS = 30.0


def backend_timeout(hang_seconds: float) -> timedelta:
    """How long NCCL and gloo may wait: longer than any watchdog of the run.

    They end a process without a word about why. They still would where Python itself is stuck.
    """
    return timedelta(seconds=2 * max(hang_seconds, START_SECONDS))


@contextmanager
def watched(
    seconds: float, run: Path, processes: Processes, step: Callable[[], int], stop: StopSignals
) -> Iterator[tuple[Watchdog, Callable[[], None]]]:
    """A watchdog with a roll call, and what a run calls now and then before its first step.

    That is a sign of life, and raises `StopRequested` on all processes after a stop signal.
    """
    with (
        RollCall(processes) as roll_call,
        Watchdog(seconds, run, processes, step, roll_call) as watchdog,
    ):

        def go_on() -> None:
            watchdog.beat()
            stop.check(processes)

        yield watchdog, go_on


class Watchdog:
    """Ends the process with code 1 when its `with` block shows no sign of life for too long.

    Every process has its own, so a cut cable or a peer that is stuck ends all of them; NCCL and
    gloo are told to wait longer (`backend_timeout`). So does a process that `roll_call` misses,
    much sooner. The main thread's stack is written down and shown, in full where it does not
    merely wait for other processes.
    """

    def __init__(
        self,
        seconds: float,
        run: Path,
        processes: Processes,
        step: Callable[[], int],
        roll_call: RollCall | None = None,
    ) -> None:
        self._roll_call = roll_call
        self._hang_seconds, self._run, self._processes, self._step = seconds, run, processes, step
        self._seconds, self._limit = max(seconds, START_SECONDS), "before the first step"
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._idle = 0.0

    def beat(self) -> None:
        """A sign of life."""
        self._idle = 0.0

    def steps_begin(self) -> None:
        """From here on the limit is the run's own; before, at least `START_SECONDS`."""
        self.beat()
        self._seconds, self._limit = self._hang_seconds, "training.hang_seconds"

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        # Turns are counted, not hours: a job that was suspended as a whole has not hung.
        turn = min(1.0, self._hang_seconds / 10)
        while not self._over.wait(turn):
            self._idle += turn
            if self._idle > self._seconds or self._gone() is not None:
                self._end()

    def _gone(self) -> str | None:
        return None if self._roll_call is None else self._roll_call.gone

    def _end(self) -> None:
        report = threading.Thread(target=self._report, name="watchdog's report", daemon=True)
        report.start()
        report.join(_REPORT_SECONDS)
        os._exit(1)

    def _report(self) -> None:
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        waits = any(word in frame.filename for frame in stack for word in _WAITING)
        # NCCL's collectives return at once; what waits for the others is the GPU.
        waits = waits or _gpu_is_busy(self._processes.device)
        doing = "waited for other processes" if waits else "did not go on"
        gone = self._gone()
        waits = waits or gone is not None
        sentence = gone or f"{doing} for {self._seconds:.0f} s ({self._limit})"
        details = "".join(traceback.format_list(stack))
        kind: Kind = "lost" if waits else "hang"
        fault = write_fault(self._run, self._processes, self._step(), kind, sentence, details)
        print(fault if waits else f"{fault}\n{details}", file=sys.stderr, flush=True)


def _gpu_is_busy(device: torch.device | None) -> bool:
    """Whether the device has work left that does not end."""
    if device is None or device.type != "cuda":
        return False
    try:
        return not torch.cuda.default_stream(device).query()
    except RuntimeError:
        return False
