"""Decoding on other ranks: an encode rank's view of its decode ranks, and what these do."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from preprocessing.communicator import Communicator, MessageKind
from preprocessing.decode_worker import DecodedItem, DecodeThreads, Task

IDLE_SECONDS = 0.002
# A clip crosses in pieces, and each waits until its sender looks again.
SENDING_SECONDS = 0.0001


class RemoteDecoder:
    """Another rank's decode threads."""

    def __init__(self, communicator: Communicator, rank: int) -> None:
        self._communicator = communicator
        self._rank = rank
        self.results: deque[DecodedItem] = deque()

    def submit(self, task: Task) -> None:
        """Send the rank one more task."""
        self._communicator.send(self._rank, MessageKind.TASK, task)

    def collect(self) -> DecodedItem | None:
        """A result that has been received, or None."""
        return self.results.popleft() if self.results else None

    def dismiss(self) -> None:
        """Tell the rank that there is no more work."""
        self._communicator.send(self._rank, MessageKind.TASK, None)


class RemoteDecoders:
    """The decode ranks of one encode rank: results are sorted by their sender.

    They are received in a thread of their own, so that clips on their way hold up neither the
    launching of GPU work nor the writing of shards. Where MPI allows one thread at a time only,
    `receive` takes them in itself. As a context manager it ends the thread.
    """

    def __init__(self, communicator: Communicator, ranks: Sequence[int]) -> None:
        self._communicator = communicator
        self.decoders = {rank: RemoteDecoder(communicator, rank) for rank in ranks}
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if communicator.receives_in_threads:
            self._thread = threading.Thread(target=self._run, name="receive", daemon=True)

    def __enter__(self) -> RemoteDecoders:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def receive(self) -> None:
        """Take in what the ranks have sent; an exception of the thread is raised here."""
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._take_in()

    def dismiss(self) -> None:
        """Tell all ranks that there is no more work."""
        for decoder in self.decoders.values():
            decoder.dismiss()

    def _take_in(self) -> bool:
        moved = False
        while message := self._communicator.receive(MessageKind.RESULT):
            rank, decoded = message
            self.decoders[rank].results.append(decoded)
            moved = True
        return moved

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                if not self._take_in():
                    time.sleep(IDLE_SECONDS)
        # Whatever it is, the main thread raises it: a silent thread would stop the farm for ever.
        except BaseException as error:
            self._error = error


def serve_encode_rank(communicator: Communicator, encode_rank: int, threads: DecodeThreads) -> None:
    """A decode rank's work: decode what the encode rank sends until it dismisses this rank."""
    under_work, dismissed = 0, False
    while under_work or not dismissed:
        moved = False
        if message := communicator.receive(MessageKind.TASK):
            moved = True
            task = message[1]
            if task is None:
                dismissed = True
            else:
                threads.submit(task)
                under_work += 1
        while decoded := threads.collect():
            moved = True
            under_work -= 1
            communicator.send(encode_rank, MessageKind.RESULT, decoded)
        if communicator.is_asked_to_stop():
            return
        if not moved:
            time.sleep(SENDING_SECONDS if communicator.is_sending() else IDLE_SECONDS)
