"""Clips on their way between ranks: they hold up nobody, arrive whole, and die with their rank."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from farm_runs import environment, mpirun

from preprocessing.communicator import LoneCommunicator, MessageKind
from preprocessing.decode_worker import DecodedItem
from preprocessing.remote_decoders import RemoteDecoders


def decoded(ticket: int) -> DecodedItem:
    return DecodedItem(ticket, np.zeros((1, 2, 2, 3), np.uint8), None, 1, None, 0.0)


class SlowCommunicator(LoneCommunicator):
    """A clip of rank 1 that is on its way until it is let through."""

    size = 2
    receives_in_threads = True

    def __init__(self) -> None:
        self.asked, self.let_through = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def receive(self, kind: MessageKind) -> tuple[int, Any] | None:
        assert kind == MessageKind.RESULT
        if self.asked.is_set():
            return None
        self.asked.set()
        assert self.let_through.wait(30)
        if self.error is not None:
            raise self.error
        return 1, decoded(7)


def test_clip_on_its_way_does_not_hold_up_the_encode_rank() -> None:
    communicator = SlowCommunicator()
    with RemoteDecoders(communicator, [1]) as remote:
        assert communicator.asked.wait(30)
        # The main thread gets here, and through `receive`, while the clip is still on its way.
        remote.receive()
        assert remote.decoders[1].collect() is None
        communicator.let_through.set()
        end = time.monotonic() + 30
        while (result := remote.decoders[1].collect()) is None:
            assert time.monotonic() < end
            remote.receive()
        assert result.ticket == 7


def receive_for_ever(remote: RemoteDecoders) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        remote.receive()


def test_error_of_the_receiving_thread_is_raised_by_the_main_thread() -> None:
    communicator = SlowCommunicator()
    communicator.error = ValueError("cannot be unpickled")
    with RemoteDecoders(communicator, [1]) as remote:
        communicator.let_through.set()
        with pytest.raises(ValueError, match="cannot be unpickled"):
            receive_for_ever(remote)


def test_without_threads_in_mpi_the_main_thread_receives() -> None:
    communicator = SlowCommunicator()
    communicator.receives_in_threads = False
    communicator.let_through.set()
    with RemoteDecoders(communicator, [1]) as remote:
        remote.receive()
        result = remote.decoders[1].collect()
        assert result is not None
        assert result.ticket == 7


# Clips of 3.4 MB from a rank that decodes nothing. "die" kills the sender with one on its way.
RANKS = """
import os, signal, sys, time
import numpy as np
from preprocessing.communicator import MessageKind, MpiCommunicator
from preprocessing.decode_worker import DecodedItem
from preprocessing.remote_decoders import RemoteDecoders, serve_encode_rank

ranks, clips = MpiCommunicator(), 40
clip = np.random.default_rng(0).integers(0, 256, (10, 336, 336, 3), np.uint8)

class Threads:
    def __init__(self):
        self.tasks = []
    def submit(self, task):
        self.tasks.append(task)
    def collect(self):
        if not self.tasks:
            return None
        if sys.argv[1] == "die" and self.tasks[0] == 20:
            ranks.send(0, MessageKind.RESULT, DecodedItem(20, clip, None, 10, None, 0.0))
            os.kill(os.getpid(), signal.SIGKILL)
        return DecodedItem(self.tasks.pop(0), clip, None, 10, None, 0.0)

if ranks.rank:
    serve_encode_rank(ranks, 0, Threads())
else:
    got, spent = [], 0.0
    with RemoteDecoders(ranks, [1]) as remote:
        decoder = remote.decoders[1]
        for ticket in range(clips):
            decoder.submit(ticket)
        while len(got) < clips:
            began = time.thread_time()
            remote.receive()
            spent += time.thread_time() - began
            while result := decoder.collect():
                assert (result.frames == clip).all()
                got.append(result.ticket)
            time.sleep(0.002)
        remote.dismiss()
    assert got == list(range(clips))
    # A copy of a clip alone takes a millisecond.
    print(f"main thread: {spent / clips * 1e3:.2f} ms a clip, {ranks.receives_in_threads}")
    assert spent / clips < 0.5e-3 or not ranks.receives_in_threads
ranks.gather_everywhere(0)
"""


def run_ranks(what: str) -> subprocess.CompletedProcess[str]:
    # The hardest way across, and that of many containers: in pieces, which both sides move.
    command = [*mpirun(2), "--mca", "smsc", "^cma,xpmem"]
    return subprocess.run(
        [*command, sys.executable, "-c", RANKS, what],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_clips_arrive_whole_and_cost_the_main_thread_nothing() -> None:
    done = run_ranks("live")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "main thread:" in done.stdout


def test_rank_that_dies_with_a_clip_on_its_way_ends_the_job() -> None:
    done = run_ranks("die")
    assert done.returncode != 0
    assert "main thread:" not in done.stdout
