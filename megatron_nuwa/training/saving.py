"""Saving beside the training: a copy to host memory, a writer in the background, a commit.

A save begins between two steps, by noting which tensors go into which file. A thread copies them
to host memory while the next step runs forward and backward; only its optimizer step waits for the
copy. The thread then writes the files. Between two later steps, once every process has written its
own, the first process makes the checkpoint whole; what is not training (an evaluation, a drawing)
waits for that.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.training.checkpoint import MODEL_FILE, Checkpoints
from megatron_nuwa.training.deepspeed_state import deepspeed_parts
from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.preflight import free_host_bytes
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.random_state import random_file, random_state
from megatron_nuwa.training.snapshot import FileRecord, Part, Weights


@dataclass
class _Job:
    """A save under way on this process."""

    step: int
    began: float
    stalled: float
    copied: threading.Event
    # The records of this process's files, or why they could not be written.
    outcome: Future[dict[str, FileRecord] | str]


class Saver:
    """Saves a run's checkpoints; every process has one.

    `copy_bytes` bounds a node's memory for copies; None for half of what is free. A save that
    fails for want of disk space and the like is told, and the run goes on. `on_progress` is called
    when a file is written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: Engine,
        processes: Processes,
        copy_bytes: int | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._checkpoints, self._engine, self._processes = checkpoints, engine, processes
        self._copy_bytes, self._on_progress = copy_bytes, on_progress
        self._neighbours = processes.gather(socket.gethostname()).count(socket.gethostname())
        self._thread = _one_thread(processes.device)
        self._stream = _own_stream(processes.device)
        self._job: _Job | None = None
        self._saved: int | None = None
        self._failure: str | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this process has files of a save to write."""
        return self._job is not None and not self._job.outcome.done()

    def save(self, step: int, texts: Mapping[str, str]) -> None:
        """Begin to save the state after `step` steps; every process must call it.

        `texts` are further files, on the first process. A save that is still running is waited
        for.
        """
        if self._job is not None:
            self._await_running()
        begin = time.perf_counter()
        folder = self._begin(step)
        if folder is None:
            return
        copied = threading.Event()
        outcome = self._thread.submit(self._write, folder, self._parts(texts), copied)
        self._job = _Job(step, begin, time.perf_counter() - begin, copied, outcome)

    def wait_until_copied(self) -> None:
        """To be called before the state changes; returns once the copy no longer needs it."""
        if self._job is not None and not self._job.copied.is_set():
            begin = time.perf_counter()
            self._job.copied.wait()
            self._job.stalled += time.perf_counter() - begin

    def settle(self) -> None:
        """Wait for the save under way and make it a whole checkpoint; every process must call it.

        Without such a save nothing happens.
        """
        job, begin = self._job, time.perf_counter()
        if job is None:
            return
        outcomes = self._processes.gather(job.outcome.result())
        job.stalled += time.perf_counter() - begin
        self._commit(outcomes)

    def _commit(self, outcomes: Sequence[dict[str, FileRecord] | str]) -> None:
        job, self._job = self._job, None
        assert job is not None
        files: dict[str, FileRecord] = {}
        failure = None
        for outcome in outcomes:
            if isinstance(outcome, str):
                failure = failure or outcome
            else:
                files |= outcome
        path = None
        if self._processes.is_first and failure is None:
            try:
                path = self._checkpoints.commit(job.step, files)
            except OSError as error:
                failure = str(error)
        self._failure = self._processes.gather(failure)[0]
        if self._failure is None:
            self._saved = job.step
        if path is not None:
            written = time.perf_counter() - job.began
            print(
                f"saved {path} in {written:.1f} s; training waited {job.stalled:.1f} s", flush=True
            )
            self._thread.submit(self._checkpoints.remove_retired)
        self._tell_failure(job.step)

    def finish(self, step: int, texts: Mapping[str, str]) -> None:
        """Have the state after `step` steps on the disk; every process must call it.

        Raises `UserError` where it cannot be written, on the other processes quietly.
        """
        self.settle()
        if self._saved != step:
            self.save(step, texts)
            self.settle()
        self._thread.shutdown()
        if self._failure is not None:
            kind = UserError if self._processes.is_first else ReportedElsewhereError
            raise kind(
                f"the state after step {step} could not be saved in {self._checkpoints.folder} "
                f"({self._failure}); make room there and start the run again"
            )

    def _await_running(self) -> None:
        assert self._job is not None
        step, begin = self._job.step, time.perf_counter()
        busy = self._processes.agree([int(self.is_writing)])[0]
        self.settle()
        if busy and self._processes.is_first:
            print(
                f"the save of step {step} was still running when the next was due; training "
                f"waited {time.perf_counter() - begin:.1f} s for it: a larger "
                "training.checkpoint_every would spare that",
                flush=True,
            )

    def _begin(self, step: int) -> Path | None:
        """The folder to write into, on every process; None where it cannot be made."""
        folder = failure = None
        if self._processes.is_first:
            try:
                folder = self._checkpoints.begin(step)
            except OSError as error:
                failure = str(error)
        folder, self._failure = self._processes.gather((folder, failure))[0]
        self._tell_failure(step)
        return folder

    def _tell_failure(self, step: int) -> None:
        if self._failure is not None and self._processes.is_first:
            self._checkpoints.abandon()
            print(
                f"warning: step {step} could not be saved ({self._failure}); training goes on, "
                "and the checkpoints before it are untouched",
                flush=True,
            )

    def _parts(self, texts: Mapping[str, str]) -> list[Part]:
        """This process's files; every process must call it."""
        processes, engine = self._processes, self._engine
        parts = [Part.capture(name, text) for name, text in texts.items()]
        parts.append(Part.capture(random_file(processes.rank), random_state()))
        parts += deepspeed_parts(engine.deepspeed)
        if engine.is_whole:
            weights: dict[str, Tensor] = dict(engine.model.named_parameters())
        else:
            weights = engine.whole_weights()
        if processes.is_first:
            metadata = {"config": engine.model.config.model_dump_json()}
            content = Weights(weights, metadata)
            parts.append(Part.capture(MODEL_FILE, content, is_own=not engine.is_whole))
        if processes.device.type == "cuda":
            # The copies, on a stream of their own, must not overtake what the step computed.
            torch.cuda.synchronize(processes.device)
        return parts

    def _write(
        self, folder: Path, parts: list[Part], copied: threading.Event
    ) -> dict[str, FileRecord] | str:
        """Copy and write files, as many at a time as fit into memory; in the thread."""
        try:
            return self._copy_and_write(folder, deque(parts), copied)
        except OSError as error:
            return f"{error.strerror or error}: {error.filename or folder}"
        finally:
            copied.set()

    def _copy_and_write(
        self, folder: Path, waiting: deque[Part], copied: threading.Event
    ) -> dict[str, FileRecord]:
        records: dict[str, FileRecord] = {}
        while waiting:
            bound = self._bound()
            copies: dict[Any, Tensor] = {}
            taken: list[Part] = []
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                while waiting and sum(p.bytes for p in taken) + waiting[0].bytes <= bound:
                    taken.append(waiting.popleft().on_host(copies))
            if not taken:
                # Larger than all that may be copied: written as it is, while the state waits.
                large = waiting.popleft()
                records[large.name] = large.write(folder)
                self._on_progress()
            if not waiting:
                copied.set()
            while taken:
                part = taken.pop(0)
                records[part.name] = part.write(folder)
                self._on_progress()
        return records

    def _bound(self) -> int:
        """Bytes that this process may copy now."""
        of_node = free_host_bytes() // 2 if self._copy_bytes is None else self._copy_bytes
        return of_node // self._neighbours


def _one_thread(device: torch.device) -> ThreadPoolExecutor:
    name = "saving"
    if device.type != "cuda":
        return ThreadPoolExecutor(1, name)
    # A new thread's device is the first, where its streams would leave a context of half a GiB for
    # every process of the node.
    return ThreadPoolExecutor(1, name, torch.cuda.set_device, (device,))


def _own_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The one that copies run on, for the whole run.

    PyTorch hands out 32 streams of a priority, again and again: one of the usual priority would
    sooner or later be one that NCCL works on.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
