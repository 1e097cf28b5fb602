"""The decode side of the farm: items become frames and text tokens, in threads."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_nuwa.data.text import NO_CAPTION, TextTokenizer
from megatron_nuwa.errors import MachineError, UserError
from preprocessing.attempts import Attempts, Journal, Journals, Trial, try_item
from preprocessing.filters import FilteredError, perceptual_hashes
from preprocessing.isolation import Demands, Frames, decode_alone, decode_item
from preprocessing.plan import PlannedItem

_HOST = socket.gethostname()


@dataclass(frozen=True)
class Task:
    """One item to decode; `ticket` is the encode rank's own name for it."""

    ticket: int
    planned: PlannedItem
    before: Attempts


@dataclass(frozen=True)
class DecodedItem:
    """What became of a task: frames uint8 (frames, H, W, 3) and text (captions, 77), or a reason.

    `maps`, uint8 (frames, H, W), are those of its sketch where sketches are asked for. `seconds`
    were spent on decoding. `filter` names the filter that left the item out. `hashes`,
    uint64 (3,), are there where near-duplicates are looked for. `host` is the decoding machine.
    `rate`, in frames a second, is there where it is not the one that was asked for.
    """

    ticket: int
    frames: np.ndarray | None
    text: np.ndarray | None
    real: int
    reason: str | None
    seconds: float
    filter: str | None = None
    hashes: np.ndarray | None = None
    maps: np.ndarray | None = None
    host: str = ""
    rate: float | None = None


class ItemDecoder:
    """Decodes one item after another, with its attempts on record."""

    def __init__(
        self,
        bpe: TextTokenizer,
        demands: Demands,
        truncate_captions: bool,
        attempts: int,
    ) -> None:
        self._bpe = bpe
        self._demands = demands
        self._truncate = truncate_captions
        self._attempts = attempts

    def decode(self, task: Task, journal: Journal) -> DecodedItem:
        """The task's frames and text tokens, or the reason why there are none.

        Raises `MachineError` where the attempts cannot be noted, a copy of the medium not be kept,
        or no decoder be started.
        """
        began = time.perf_counter()
        planned = task.planned
        try:
            text = self._text(planned)
            frames, real, maps, rate = self._frames(task, journal)
            hashes = None
            if self._demands.filters.near_duplicates is not None:
                hashes = perceptual_hashes(frames, real)
        except MachineError:
            raise
        except UserError as error:
            seconds = time.perf_counter() - began
            rule = error.filter if isinstance(error, FilteredError) else None
            return DecodedItem(task.ticket, None, None, 0, str(error), seconds, rule, host=_HOST)
        seconds = time.perf_counter() - began
        return DecodedItem(
            *(task.ticket, frames, text, real, None, seconds),
            hashes=hashes,
            maps=maps,
            host=_HOST,
            rate=rate,
        )

    def _text(self, planned: PlannedItem) -> np.ndarray:
        item = planned.item
        if planned.repeated:
            raise UserError(f"the id {item.id!r} stands in an earlier line of the manifest too")
        if not item.captions:
            raise UserError(
                f'item {item.id!r} has no caption; give it "{NO_CAPTION}" where it has none'
            )
        rows = [self._bpe.encode(text, truncate=self._truncate) for text in item.captions]
        return np.concatenate(rows).reshape(len(rows), -1)

    def _frames(self, task: Task, journal: Journal) -> Frames:
        item = task.planned.item
        return try_item(
            Trial(task.planned.row, item.media, task.before, self._attempts),
            journal,
            lambda: decode_item(item, self._demands),
            lambda: decode_alone(item, self._demands),
        )


class DecodeThreads:
    """Threads that decode tasks; results come in the order in which they are ready."""

    def __init__(self, decoder: ItemDecoder, state: Path, threads: int) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[DecodedItem | BaseException] = queue.SimpleQueue()
        self._decoder = decoder
        self._journals = Journals(state)
        self._stopping = threading.Event()
        self._threads: Sequence[threading.Thread] = [
            threading.Thread(target=self._run, name=f"decode-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> None:
        """Give the threads one more task."""
        self._tasks.put(task)

    def collect(self) -> DecodedItem | None:
        """A result, or None where none is ready; an exception of a thread is raised here."""
        try:
            result = self._results.get_nowait()
        except queue.Empty:
            return None
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Let the threads finish the item they are at, and no other."""
        self._stopping.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._journals.close()

    def _run(self) -> None:
        try:
            with self._journals.open() as journal:
                while (task := self._tasks.get()) is not None and not self._stopping.is_set():
                    self._results.put(self._decoder.decode(task, journal))
        # Whatever it is, the main thread raises it: a silent thread would stop the farm for ever.
        except BaseException as error:
            self._results.put(error)
