"""Ending a run early because somebody asked for it: all processes together, with a save."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # A process takes signals before it spends seconds on importing torch.
    from megatron_nuwa.training.processes import Processes

# What schedulers and launchers send before they kill; Slurm's --signal may be the second.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):  # noqa: N818
    """The processes have agreed to stop, on the word of a signal."""


class StopSignals:
    """Takes note of SIGTERM and SIGUSR1 in a `with` block, instead of dying of them.

    A signal may reach one process only, or all at different moments, so what counts is what the
    processes agree on. Outside the main thread no signals are taken.
    """

    def __init__(self) -> None:
        self._received = 0
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._usual = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *reason: object) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    @property
    def received(self) -> int:
        """The number of the signal that this process got, 0 before."""
        return self._received

    def check(self, processes: Processes) -> None:
        """Raise `StopRequested` on every process if any got a signal; each must call it."""
        raise_if_stopped(processes.agree([self._received])[0])


@contextmanager
def told_before_the_first_step(
    stop: StopSignals | None, processes: Processes
) -> Iterator[StopSignals]:
    """The stop signals of a run, those of `stop` if it takes them already.

    A `StopRequested` that leaves the block came before any step: the first process says so, and the
    block just ends.
    """
    with StopSignals() if stop is None else nullcontext(stop) as signals:
        try:
            yield signals
        except StopRequested as request:
            if processes.is_first:
                ends = "before this start's first step: nothing to save, ending"
                print(f"{request} received {ends}", flush=True)


@contextmanager
def workers_start() -> Iterator[None]:
    """Start a loader's worker processes in the block: stop signals wait until each can ignore them.

    The workers inherit this thread's mask. What this process is sent meanwhile another of its
    threads takes, or this one at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # The first worker's start would start it, and that lets SIGTERM through again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_stop_signals(_worker: int) -> None:
    """Have a loader's worker process ignore stop signals, and end when its parent does.

    Launchers and schedulers send one to every process, but a run that lost its workers could not
    go on to the next save, however long that takes. Processes that a worker starts ignore them too.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # PyTorch's workers look for their parent, too, but only between two batches.
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(0)


def raise_if_stopped(number: int) -> None:
    """Raise `StopRequested` for an agreed signal number other than 0."""
    if number:
        raise StopRequested(signal.Signals(number).name)
