"""The sampling order: `(seed, step) → the global batch`, a pure function.

Nothing is stored between steps, so a run's data position is one integer, no sample is lost or
repeated on resume, and the number of ranks does not matter.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
# Weights of corpora are kept to the nearest whole share of this many positions.
SHARE_PERIOD = 1 << 16


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

    Without weights an epoch is a permutation of all items of all corpora, each epoch another one.
    With weights each corpus has epochs of its own, and its positions are spread as evenly as whole
    numbers allow, their shares exact over every `SHARE_PERIOD` positions.

    Raises `ValueError` for an empty corpus and for weights that do not fit the corpora.
    """

    def __init__(
        self,
        seed: int,
        task: str,
        corpus_sizes: Sequence[int],
        batch_size: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not corpus_sizes or min(corpus_sizes) < 1:
            raise ValueError(f"corpus_sizes must be at least 1 each, not {list(corpus_sizes)}")
        if weights is not None and len(weights) != len(corpus_sizes):
            raise ValueError(f"{len(corpus_sizes)} corpora need as many weights, not {weights}")
        self._key = mix(seed, zlib.crc32(task.encode()))
        self._sizes = [int(size) for size in corpus_sizes]
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(corpus_sizes, dtype=np.int64))])
        self._shares = None if weights is None else whole_shares(weights, SHARE_PERIOD)
        self.batch_size = batch_size

    @property
    def items(self) -> int:
        """Items of all corpora together."""
        return int(self._starts[-1])

    def batch(self, step: int) -> list[Pick]:
        """The global batch of a step, 0-based."""
        first = step * self.batch_size
        return [self.pick(first + offset) for offset in range(self.batch_size)]

    def pick(self, position: int) -> Pick:
        """The sample at a place of the stream."""
        if self._shares is None:
            corpus, item = self._by_size(position)
        else:
            corpus, item = self._by_weight(position, self._shares)
        draws = (mix(self._key, position, salt) / (1 << 64) for salt in (1, 2))
        return Pick(corpus, item, *draws)

    def _by_size(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.items)
        index = permuted(place, self.items, mix(self._key, epoch))
        corpus = int(np.searchsorted(self._starts, index, side="right")) - 1
        return corpus, index - int(self._starts[corpus])

    def _by_weight(self, position: int, shares: Sequence[int]) -> tuple[int, int]:
        corpus, occurrence = dealt(position, shares)
        epoch, place = divmod(occurrence, self._sizes[corpus])
        key = mix(self._key, epoch, corpus)
        return corpus, permuted(place, self._sizes[corpus], key)


def dealt(position: int, shares: Sequence[int]) -> tuple[int, int]:
    """Who owns a position when owners alternate by shares, and how many it owned before.

    Each owner in turn takes its part of the positions that those before it left, as evenly as
    Bresenham's line climbs, so the answer needs no history.
    """
    left = sum(shares)
    for owner, share in enumerate(shares):
        before = position * share // left
        if (position + 1) * share // left > before:
            return owner, before
        position -= before
        left -= share
    raise ValueError(f"shares must be at least 1 each, not {list(shares)}")


def whole_shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` split in proportion to the weights into whole numbers of at least 1.

    Raises `ValueError` for weights that are not positive and finite, or more than `total` of them.
    """
    if not weights or len(weights) > total or not all(0 < w < math.inf for w in weights):
        raise ValueError(f"weights must be up to {total} positive numbers, not {list(weights)}")
    # Scaled first, so that the sum of huge weights stays finite; fsum is the same everywhere.
    scaled = [weight / max(weights) for weight in weights]
    exact = [weight / math.fsum(scaled) * total for weight in scaled]
    shares = [max(1, math.floor(value)) for value in exact]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        able = [i for i, share in enumerate(shares) if share + step >= 1]
        shares[max(able, key=lambda i: step * (exact[i] - shares[i]))] += step
    return shares


def even_sizes(count: int, parts: int) -> list[int]:
    """`count` cut into `parts` whole numbers that differ by at most 1, the larger ones first."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def rank_slice(batch: Sequence[Pick], rank: int, ranks: int) -> Sequence[Pick]:
    """A rank's consecutive share of a global batch; the batch must divide evenly."""
    if len(batch) % ranks:
        raise ValueError(f"a batch of {len(batch)} does not divide by {ranks} ranks")
    share = len(batch) // ranks
    return batch[rank * share : (rank + 1) * share]
