"""Decoding inside another process, which hostile media may crash, stall or fill."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from megatron_nuwa.decoders.restarts import STARTS, was_killed
from megatron_nuwa.decoders.settings import (
    LONGEST_WAIT,
    DecodeError,
    DecodeLimits,
    DecodeSettings,
)

START_SECONDS = 60.0
_CHUNK = 1 << 20


class _DiedError(Exception):
    """The worker has ended: something in a file made it, or something outside."""


class _Worker:
    """A process that decodes one request after another."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_nuwa.decoders.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "OPENBLAS_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "1",
            },
        )
        assert self._process.stdout is not None
        # Not select(), which fails at descriptors from 1,024 on: a loader may hold many files.
        self._answers = select.poll()
        self._answers.register(self._process.stdout, select.POLLIN)
        self._received = bytearray()
        try:
            self._read_line(time.monotonic() + START_SECONDS)
        except BaseException:
            self.end()
            raise

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], bytes]:
        """The answer's header and content; `TimeoutError` or `_DiedError` where there is none."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + seconds
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise _DiedError from error
        header = json.loads(self._read_line(deadline))
        return header, self._read(header.get("bytes", 0), deadline)

    @property
    def process_id(self) -> int:
        """Number of the process."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def end(self) -> int:
        """End the process, whatever it is at; its exit code, if it had ended before its own."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            # A request that was not sent any more.
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        return self._process.wait()

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._received:
            self._receive(deadline)
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        return line

    def _read(self, count: int, deadline: float) -> bytes:
        while len(self._received) < count:
            self._receive(deadline)
        content, self._received = self._received, bytearray()
        return bytes(content)

    def _receive(self, deadline: float) -> None:
        assert self._process.stdout is not None
        left = min(deadline - time.monotonic(), LONGEST_WAIT)
        if left <= 0 or not self._answers.poll(1000 * left):
            raise TimeoutError
        chunk = os.read(self._process.stdout.fileno(), _CHUNK)
        if not chunk:
            raise _DiedError
        self._received += chunk


_idle: SimpleQueue[_Worker] = SimpleQueue()


def guarded(
    task: str, path: Path, limits: DecodeLimits, settings: DecodeSettings, **arguments: Any
) -> Any:
    """What the worker's task gives for a file; `DecodeError` also where the file ends the worker.

    Threads may call this at once: each call has a worker to itself.
    """
    request = {
        "task": task,
        "path": str(path.absolute()),
        "settings": settings.model_dump(mode="json"),
        "limits": limits.model_dump(mode="json"),
        "arguments": arguments,
    }
    worker, header, content = _answered(path, request, limits.seconds, STARTS)
    if header["ends"]:
        worker.end()
    else:
        _idle.put(worker)
    if "error" in header:
        # The worker knows the file by its absolute name.
        raise DecodeError(header["error"].replace(request["path"], str(path), 1))
    if "shape" in header:
        return np.frombuffer(content, np.uint8).reshape(header["shape"])
    return header["value"]


def _answered(
    path: Path, request: dict[str, Any], seconds: float, starts: int
) -> tuple[_Worker, dict[str, Any], bytes]:
    """A worker's answer, and the worker; one that is killed is replaced until `starts` were."""
    try:
        worker = _take()
    except (_DiedError, TimeoutError) as error:
        # No file was asked for yet.
        if starts > 1:
            return _answered(path, request, seconds, starts - 1)
        raise DecodeError(f"{path} cannot be decoded: no decoder starts") from error
    try:
        return worker, *worker.ask(request, seconds)
    except TimeoutError as error:
        worker.end()
        raise DecodeError(f"{path} took longer than {seconds:g} s to decode") from error
    except _DiedError as error:
        if was_killed(worker.end()) and starts > 1:
            return _answered(path, request, seconds, starts - 1)
        raise DecodeError(f"{path} crashes its decoder") from error
    except BaseException:
        worker.end()
        raise


def _take() -> _Worker:
    while True:
        try:
            worker = _idle.get_nowait()
        except Empty:
            return _Worker()
        if worker.is_alive():
            return worker
        # Ended from outside while it waited, which the next file must not be blamed for.
        worker.end()


def _forget() -> None:
    global _idle
    _idle = SimpleQueue()


def worker_processes() -> list[int]:
    """Process ids of the workers that wait for requests."""
    waiting = []
    with contextlib.suppress(Empty):
        while True:
            waiting.append(_idle.get_nowait())
    for worker in waiting:
        _idle.put(worker)
    return [worker.process_id for worker in waiting]


@atexit.register
def end_workers() -> None:
    """End the workers that wait for requests."""
    while True:
        try:
            _idle.get_nowait().end()
        except Empty:
            return


# The pipes of a parent's workers are the parent's.
os.register_at_fork(after_in_child=_forget)
