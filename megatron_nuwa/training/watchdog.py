"""Ending a process that makes no progress, so that a hung run does not hold its nodes for ever."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_nuwa.training.faults import Kind, write_fault
from megatron_nuwa.training.processes import Processes

# Whoever is in there waits for other processes.
_WAITING = (f"{os.sep}torch{os.sep}distributed", f"{os.sep}deepspeed{os.sep}comm")


class Watchdog:
    """Ends the process with code 1 when its `with` block shows no sign of life for too long.

    Every process has its own, so a cut cable or a peer that is stuck ends all of them, whatever
    the backend's time-outs are. The main thread's stack is written down and shown, in full where
    it does not merely wait for other processes.
    """

    def __init__(
        self, seconds: float, run: Path, processes: Processes, step: Callable[[], int]
    ) -> None:
        self._seconds, self._run, self._processes, self._step = seconds, run, processes, step
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._idle = 0.0

    def beat(self) -> None:
        """A sign of life."""
        self._idle = 0.0

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
        turn = min(1.0, self._seconds / 10)
        while not self._over.wait(turn):
            self._idle += turn
            if self._idle > self._seconds:
                self._end()

    def _end(self) -> None:
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        waits = any(word in frame.filename for frame in stack for word in _WAITING)
        doing = "waited for other processes" if waits else "did not go on"
        sentence = f"{doing} for {self._seconds:.0f} s (training.hang_seconds)"
        details = "".join(traceback.format_list(stack))
        kind: Kind = "lost" if waits else "hang"
        fault = write_fault(self._run, self._processes, self._step(), kind, sentence, details)
        print(fault if waits else f"{fault}\n{details}", file=sys.stderr, flush=True)
        os._exit(1)
