"""The encode side of the farm: one rank gives out work, encodes what comes back, writes shards."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from preprocessing.assembly import ShardAssembly
from preprocessing.attempts import Attempts
from preprocessing.communicator import Claims
from preprocessing.decode_worker import DecodedItem, Task
from preprocessing.encoder import EncodedBatch, Encoders
from preprocessing.figures import Figures
from preprocessing.health import MOST_FAILURES, Health
from preprocessing.ledger import CorpusSettings
from preprocessing.plan import Plan
from preprocessing.shown_samples import Samples
from preprocessing.sources.locations import Location

# The queue: batches that are complete, in the making or on the GPU, and items that decode threads
# are at or have next. Items take unequal times, and a slow one keeps its batch from the encoder.
QUEUE_BATCHES = 4
QUEUE_ITEMS_A_THREAD = 4
QUEUE_BYTES = 2**30
# While the GPU is at one batch, the next is on its way there.
BATCHES_AT_ONCE = 2
IDLE_SECONDS = 0.002


class Decoder(Protocol):
    """Where an encode rank has items decoded."""

    def submit(self, task: Task) -> None:
        """Have one more task done, without waiting."""

    def collect(self) -> DecodedItem | None:
        """A result that is ready, or None."""


@dataclass(frozen=True)
class Work:
    """What there is to do, the same on all encode ranks."""

    pending: Sequence[int]
    plan: Plan
    settings: CorpusSettings
    output: Path
    media_folder: Location
    attempts: Mapping[int, Attempts]
    most_failures: float = MOST_FAILURES


@dataclass(frozen=True)
class _UnderWork:
    """A batch of a shard, encoded since `began`: its frames, and its sketches if it has any."""

    assembly: ShardAssembly
    batch: int
    encoded: Sequence[EncodedBatch]
    began: float


def queue_capacity(settings: CorpusSettings, decode_threads: int) -> int:
    """How many items may be given out and not yet encoded: a few a decode thread, within a GiB."""
    frame_bytes = 3 * settings.decode.image_size**2
    if settings.sketch is not None:
        frame_bytes += settings.sketch.image_size**2
    batches = QUEUE_BATCHES * settings.items_per_batch
    asked = batches + QUEUE_ITEMS_A_THREAD * decode_threads
    # Four batches keep the encoder at work, however large they are.
    return max(batches, min(asked, QUEUE_BYTES // (settings.decode.frames * frame_bytes)))


class EncodeLoop:
    """Claims shards, keeps the decoders busy and encodes; memory is bounded by the queue.

    An item holds its place in the queue from when it is given out until it is encoded. Items are
    given out in the manifest's order, so the oldest batch always finds room and cannot be blocked.
    """

    def __init__(
        self,
        work: Work,
        encoders: Encoders,
        decoders: Sequence[Decoder],
        claims: Claims,
        receive: Callable[[], None],
        decode_threads: int,
    ) -> None:
        """`decode_threads` is how many threads the decoders have together."""
        self._work = work
        self._encoders = encoders
        self._decoders = decoders
        self._receive = receive
        self._tasks = self._all_tasks(claims)
        self._next: Task | None = None
        self._exhausted = False
        self._places: dict[int, tuple[ShardAssembly, int]] = {}
        self._given = [0] * len(decoders)
        self._health = [Health(work.most_failures) for _ in decoders]
        self._ready: deque[tuple[ShardAssembly, int]] = deque()
        self._encoding: deque[_UnderWork] = deque()
        self._held = 0
        self._last_finish = 0.0
        self.capacity = queue_capacity(work.settings, decode_threads)
        self.figures = Figures()
        self.samples = Samples()

    def take_figures(self) -> Figures:
        """What has been counted since the last call."""
        figures, self.figures = self.figures, Figures()
        return figures

    def run(self) -> Iterator[None]:
        """Do the work, yielding after every step; the caller may leave at any of them."""
        looked, fill = time.perf_counter(), 0.0
        while True:
            self._receive()
            moved = self._give_out() | self._take_in()
            # By time and not by steps: an idle one lasts 2 ms, and one that encodes may last long.
            now = time.perf_counter()
            self.figures.queue_seconds += now - looked
            self.figures.queue_fill += fill * (now - looked)
            looked, fill = now, self._held / self.capacity
            if self._ready and len(self._encoding) < BATCHES_AT_ONCE:
                self._encode(*self._ready.popleft())
                moved = True
            moved |= self._finish_batches()
            yield
            if self._exhausted and not self._held:
                return
            if not moved:
                began = time.perf_counter()
                time.sleep(IDLE_SECONDS)
                if not self._encoding:
                    self.figures.starved_seconds += time.perf_counter() - began

    def _all_tasks(self, claims: Claims) -> Iterator[Task]:
        work, ticket = self._work, 0
        while (claim := claims.claim()) < len(work.pending):
            shard = work.pending[claim]
            planned = work.plan.items(shard)
            assembly = ShardAssembly(shard, planned, work.settings, work.media_folder)
            for index, entry in enumerate(planned):
                self._places[ticket] = assembly, index
                yield Task(ticket, entry, work.attempts.get(entry.row, Attempts()))
                ticket += 1

    def _give_out(self) -> bool:
        moved = False
        limit = -(-self.capacity // len(self._decoders))
        while self._held < self.capacity:
            decoder = min(range(len(self._decoders)), key=self._given.__getitem__)
            if self._given[decoder] >= limit:
                break
            task = next(self._tasks, None)
            if task is None:
                self._exhausted = True
                break
            self._decoders[decoder].submit(task)
            self._given[decoder] += 1
            self._held += 1
            moved = True
        return moved

    def _take_in(self) -> bool:
        moved = False
        for number, decoder in enumerate(self._decoders):
            while decoded := decoder.collect():
                self._given[number] -= 1
                if decoded.filter is None:
                    failed = decoded.frames is None
                    self._health[number].count(failed, decoded.host, decoded.reason)
                self._take(decoded)
                moved = True
        return moved

    def _take(self, decoded: DecodedItem) -> None:
        assembly, index = self._places.pop(decoded.ticket)
        self.figures.items += 1
        self.figures.failed += decoded.frames is None and decoded.filter is None
        self.figures.left_out += decoded.filter is not None
        self.figures.decode_seconds += decoded.seconds
        if decoded.frames is not None:
            planned = assembly.planned[index]
            self.samples.offer(planned.row, planned.item, decoded.frames, decoded.maps)
        batch = assembly.take(index, decoded)
        if batch is not None:
            self._ready.append((assembly, batch))

    def _encode(self, assembly: ShardAssembly, batch: int) -> None:
        frames, maps = assembly.frames(batch), assembly.maps(batch)
        if frames is None:
            self._put(assembly, batch)
            return
        began = time.perf_counter()
        encoded = [self._encoders.frames.start(frames)]
        if maps is not None:
            assert self._encoders.sketches is not None
            encoded.append(self._encoders.sketches.start(maps))
        self.figures.frames += len(frames)
        self.figures.batches += 1
        self._encoding.append(_UnderWork(assembly, batch, encoded, began))

    def _finish_batches(self) -> bool:
        moved = False
        while self._encoding and all(part.is_ready() for part in self._encoding[0].encoded):
            done = self._encoding.popleft()
            tokens = [part.tokens() for part in done.encoded]
            now = time.perf_counter()
            # Batches overlap on a GPU: the same second must not be counted twice.
            self.figures.encode_seconds += now - max(done.began, self._last_finish)
            self._last_finish = now
            self._put(done.assembly, done.batch, *tokens)
            moved = True
        return moved

    def _put(
        self,
        assembly: ShardAssembly,
        batch: int,
        tokens: np.ndarray | None = None,
        sketches: np.ndarray | None = None,
    ) -> None:
        self._held -= assembly.items_in(batch)
        if not assembly.put(batch, tokens, sketches):
            return
        began = time.perf_counter()
        assembly.write(self._work.output)
        self.figures.write_seconds += time.perf_counter() - began
        self.figures.shards += 1
