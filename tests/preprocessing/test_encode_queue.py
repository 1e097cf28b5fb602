"""The queue between decode and encode ranks in virtual time: neither side waits for the other."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_nuwa.data.shards import Fingerprints
from megatron_nuwa.decoders import DecodeSettings
from preprocessing import encode_loop
from preprocessing.communicator import LoneClaims
from preprocessing.decode_worker import DecodedItem, Task
from preprocessing.encode_loop import QUEUE_BYTES, EncodeLoop, Work, queue_capacity
from preprocessing.isolation import SketchSettings
from preprocessing.ledger import CorpusSettings
from preprocessing.plan import PlannedItem
from preprocessing.sources import SourceItem

CLIPS = 1500
GPU_SECONDS_A_BATCH = 0.03


def settings(**more: object) -> CorpusSettings:
    """Ten frames of 336², six clips a batch."""
    fields: dict[str, object] = {
        "manifest_sha256": "",
        "manifest_items": CLIPS,
        "decode": DecodeSettings(image_size=336, frames=10),
        "grid_side": 21,
        "codebook_size": 8192,
        "text_vocabulary_size": 512,
        "fingerprints": Fingerprints(vqgan="", bpe="", decode=""),
        "items_per_shard": CLIPS,
        "batch_size": 64,
        "long_captions": "refuse",
    }
    return CorpusSettings.model_validate(fields | more)


class Clock:
    """Seconds that pass only while the loop sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class VirtualDecoder:
    """One decode thread, whose items take as long as they are said to."""

    def __init__(self, clock: Clock, seconds: Callable[[], float]) -> None:
        self._clock, self._seconds = clock, seconds
        self._results: list[tuple[float, int]] = []
        self._free = 0.0
        self.busy = 0.0
        self._frames = np.zeros((10, 1, 1, 3), np.uint8)

    def submit(self, task: Task) -> None:
        seconds = self._seconds()
        self._free = max(self._clock.now, self._free) + seconds
        self.busy += seconds
        heapq.heappush(self._results, (self._free, task.ticket))

    def collect(self) -> DecodedItem | None:
        if not self._results or self._results[0][0] > self._clock.now:
            return None
        ticket = heapq.heappop(self._results)[1]
        return DecodedItem(ticket, self._frames, np.zeros((1, 77), np.uint16), 10, None, 0.0)


class VirtualEncoder:
    """A GPU on which one batch follows the other."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._free = clock, 0.0

    def start(self, frames: np.ndarray) -> object:
        self._free = max(self._clock.now, self._free) + GPU_SECONDS_A_BATCH
        done, tokens = self._free, np.zeros((len(frames), 21, 21), np.uint16)
        return SimpleNamespace(is_ready=lambda: self._clock.now >= done, tokens=lambda: tokens)


class SlowEncoder:
    """A CPU, on which the loop waits for a batch."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def start(self, frames: np.ndarray) -> object:
        self._clock.sleep(self._seconds)
        tokens = np.zeros((len(frames), 21, 21), np.uint16)
        return SimpleNamespace(is_ready=lambda: True, tokens=lambda: tokens)


def loop_of(
    clock: Clock,
    clips: int,
    ranks: list[VirtualDecoder],
    encoder: VirtualEncoder | SlowEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> EncodeLoop:
    """A loop that has so many clips to do."""
    monkeypatch.setattr(encode_loop, "time", clock)
    monkeypatch.setattr(encode_loop.ShardAssembly, "write", lambda *_: None)
    items = [
        PlannedItem(row, SourceItem(id=str(row), media="clip.mp4", captions=("",)), False)
        for row in range(clips)
    ]
    plan = SimpleNamespace(items=lambda shard: items)
    work = Work([0], plan, settings(), Path(), Path(), {})  # type: ignore[arg-type]
    encoders = SimpleNamespace(frames=encoder)
    return EncodeLoop(work, encoders, ranks, LoneClaims(), lambda: None, len(ranks))  # type: ignore[arg-type]


def decoders_at_work(
    decoders: int, seconds: Callable[[random.Random], float], monkeypatch: pytest.MonkeyPatch
) -> float:
    """The share of their time that decoders are at work."""
    clock, chance = Clock(), random.Random(0)
    ranks = [VirtualDecoder(clock, lambda: seconds(chance)) for _ in range(decoders)]
    loop = loop_of(clock, CLIPS, ranks, VirtualEncoder(clock), monkeypatch)
    assert sum(1 for _ in itertools.islice(loop.run(), 10**6)) < 10**6
    assert loop.figures.items == CLIPS
    assert all(rank.busy for rank in ranks)
    return sum(rank.busy for rank in ranks) / clock.now / decoders


@pytest.mark.parametrize(
    ("decoders", "seconds", "least"),
    [
        # Clips of two sizes; before: 0.78.
        (15, lambda chance: chance.choice((0.098, 0.27)), 0.95),
        # All sorts of clips; before: 0.53 and 0.26.
        (15, lambda chance: 0.15 * chance.lognormvariate(-0.5, 1), 0.9),
        (31, lambda chance: 0.15 * chance.lognormvariate(-0.5, 1), 0.8),
        # One in a hundred is very slow, and its batch waits for it; before: 0.43.
        (15, lambda chance: 10.0 if chance.random() < 0.01 else 0.15, 0.55),
    ],
    ids=["two sizes", "lognormal", "lognormal, 31 ranks", "one in a hundred takes 10 s"],
)
def test_decode_ranks_do_not_wait_for_the_queue(
    decoders: int,
    seconds: Callable[[random.Random], float],
    least: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert decoders_at_work(decoders, seconds, monkeypatch) > least


def test_the_queue_is_as_full_as_it_is_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held = 0.0

    class Watched(Clock):
        def sleep(self, seconds: float) -> None:
            nonlocal held
            held += loop._held * seconds
            super().sleep(seconds)

    clock = Watched()
    # The last item takes as long as all batches: half of the time the queue is nearly empty.
    times = iter([0.0] * 59 + [20.0])
    ranks = [VirtualDecoder(clock, lambda: next(times))]
    loop = loop_of(clock, 60, ranks, SlowEncoder(clock, 1.0), monkeypatch)
    steps = sum(1 for _ in loop.run())
    assert steps > 1000
    assert loop.figures.queue_seconds == pytest.approx(clock.now, rel=0.1)
    assert 0.4 < held / loop.capacity / clock.now < 0.6
    assert loop.figures.fill == pytest.approx(held / loop.capacity / clock.now, rel=0.1)


def test_queue_holds_four_items_a_decode_thread_within_a_gib() -> None:
    assert queue_capacity(settings(), 1) == 4 * 6 + 4
    assert queue_capacity(settings(), 15) == 4 * 6 + 60
    clip = 10 * 336**2 * 3
    assert queue_capacity(settings(), 10_000) == QUEUE_BYTES // clip
    sketch = SketchSettings(image_size=336, classes=8, codebook_size=64)
    assert queue_capacity(settings(sketch=sketch), 10_000) == QUEUE_BYTES // (clip // 3 * 4)
    # Large batches keep four of themselves.
    assert queue_capacity(settings(batch_size=10_000), 1) == 4 * 1000
