"""The sampling order: `(seed, step) → the global batch`, a pure function.

Nothing is stored between steps, so a run's data position is one integer, no sample is lost or
repeated on resume, and the number of ranks does not matter.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64, chained)."""
    state = 0
    for value in values:
        state = (state ^ (value & _WORD)) & _WORD
        state = (state + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def permuted(position: int, count: int, key: int) -> int:
    """Where a position goes in the permutation of `range(count)` that `key` names.

    A Feistel network over the next power of four, walked until it lands inside: the memory is
    constant, whatever the count.
    """
    if not 0 <= position < count:
        raise ValueError(f"position must be in 0 … {count - 1}, not {position}")
    half = max((count - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (mix(key, round_number, right) & low)
        position = (left << half) | right
        if position < count:
            return position


@dataclass(frozen=True)
class Pick:
    """One sample of a batch: which item, and two uniform draws in [0, 1) that belong to it."""

    corpus: int
    item: int
    caption_draw: float
    dropout_draw: float


class SamplingOrder:
    """The endless stream of one task's samples, cut into global batches.

    Every epoch is a permutation of all items of all corpora, each epoch another one.
    """

    def __init__(self, seed: int, task: str, corpus_sizes: Sequence[int], batch_size: int) -> None:
        if not corpus_sizes or min(corpus_sizes) < 1:
            raise ValueError(f"corpus_sizes must be at least 1 each, not {list(corpus_sizes)}")
        self._key = mix(seed, zlib.crc32(task.encode()))
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(corpus_sizes, dtype=np.int64))])
        self.batch_size = batch_size

    @property
    def items(self) -> int:
        """Items in one epoch."""
        return int(self._starts[-1])

    def batch(self, step: int) -> list[Pick]:
        """The global batch of a step, 0-based."""
        first = step * self.batch_size
        return [self.pick(first + offset) for offset in range(self.batch_size)]

    def pick(self, position: int) -> Pick:
        """The sample at a place of the stream."""
        epoch, place = divmod(position, self.items)
        index = permuted(place, self.items, mix(self._key, epoch))
        corpus = int(np.searchsorted(self._starts, index, side="right")) - 1
        draws = (mix(self._key, position, salt) / (1 << 64) for salt in (1, 2))
        return Pick(corpus, index - int(self._starts[corpus]), *draws)


def rank_slice(batch: Sequence[Pick], rank: int, ranks: int) -> Sequence[Pick]:
    """A rank's consecutive share of a global batch; the batch must divide evenly."""
    if len(batch) % ranks:
        raise ValueError(f"a batch of {len(batch)} does not divide by {ranks} ranks")
    share = len(batch) // ranks
    return batch[rank * share : (rank + 1) * share]
