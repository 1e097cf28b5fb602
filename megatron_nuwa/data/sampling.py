"""The sampling order: `(seed, step) → the global batch`, a pure function.

Nothing is stored between steps, so a run's data position is one integer, no sample is lost or
repeated on resume, and the number of ranks does not matter.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_nuwa.data.permutation import mix, mixed, permuted_all

# Weights of corpora are kept to the nearest whole share of this many positions.
SHARE_PERIOD = 1 << 16
# Positions are worked out this many at a time, fewer for a handful of items, in many short epochs,
# and few such blocks are remembered.
_LARGEST_BLOCK, _SMALLEST_BLOCK, _BLOCKS_KEPT = 1 << 12, 1 << 6, 4
# What tells the draws apart that belong to one sample, and those of a step from both.
_SAMPLE_SALTS, _STEP_SALT = (1, 2), 3


@dataclass(frozen=True)
class Pick:
    """One sample of a batch: which item, and two uniform draws in [0, 1) that belong to it."""

    corpus: int
    item: int
    caption_draw: float
    dropout_draw: float


@dataclass(frozen=True)
class Picks:
    """Samples in a row, as arrays: what a list of `Pick` says, column by column."""

    corpus: np.ndarray
    item: np.ndarray
    caption_draw: np.ndarray
    dropout_draw: np.ndarray

    @classmethod
    def of(cls, picks: Sequence[Pick]) -> Picks:
        """The columns of single picks."""
        return cls(
            np.array([pick.corpus for pick in picks], np.int64),
            np.array([pick.item for pick in picks], np.int64),
            np.array([pick.caption_draw for pick in picks], np.float64),
            np.array([pick.dropout_draw for pick in picks], np.float64),
        )

    def __len__(self) -> int:
        return len(self.corpus)

    def __iter__(self) -> Iterator[Pick]:
        for row in zip(*(column.tolist() for column in self._columns()), strict=True):
            yield Pick(*row)

    def part(self, start: int, end: int) -> Picks:
        """Those from `start` to before `end`."""
        return Picks(*(column[start:end] for column in self._columns()))

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.corpus, self.item, self.caption_draw, self.dropout_draw

    @staticmethod
    def joined(parts: Sequence[Picks]) -> Picks:
        """One after the other."""
        return Picks(*map(np.concatenate, zip(*(part._columns() for part in parts), strict=True)))


class SamplingOrder:
    """The endless stream of one task's samples, cut into global batches.

    Without weights an epoch is a permutation of all items of all corpora, each epoch another one.
    With weights each corpus has epochs of its own, and its positions are spread as evenly as whole
    numbers allow, their shares exact over every `SHARE_PERIOD` positions.

    With `shuffle_window` an epoch goes through the shards in a permuted order, that many at a time,
    and through the items of these in a permuted order, so that a reader far from its shards holds
    few of them at once; it needs `shard_sizes`, the items of each corpus's shards.

    Raises `ValueError` for an empty corpus and for weights or shards that do not fit the corpora.
    """

    def __init__(
        self,
        seed: int,
        task: str,
        corpus_sizes: Sequence[int],
        batch_size: int,
        weights: Sequence[float] | None = None,
        shuffle_window: int | None = None,
        shard_sizes: Sequence[Sequence[int] | np.ndarray] | None = None,
    ) -> None:
        sizes = [int(size) for size in corpus_sizes]
        if not sizes or min(sizes) < 1:
            raise ValueError(f"corpus_sizes must be at least 1 each, not {list(corpus_sizes)}")
        if weights is not None and len(weights) != len(sizes):
            raise ValueError(f"{len(sizes)} corpora need as many weights, not {weights}")
        self._key = mix(seed, zlib.crc32(task.encode()))
        self._starts = np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))])
        self.batch_size = batch_size
        shards = [np.array([size], np.int64) for size in sizes]
        if shuffle_window is not None:
            shards = _checked_shards(shuffle_window, shard_sizes, sizes)
        self._deal: _Deal | None = None
        if weights is not None:
            self._deal = _Deal(whole_shares(weights, SHARE_PERIOD))
            self._epochs = [
                _Epochs(size, shuffle_window, own) for size, own in zip(sizes, shards, strict=True)
            ]
        else:
            self._epochs = [_Epochs(self.items, shuffle_window, np.concatenate(shards))]
        self._block_size = min(max(self.items, _SMALLEST_BLOCK), _LARGEST_BLOCK)
        self._blocks: dict[int, Picks] = {}

    @property
    def items(self) -> int:
        """Items of all corpora together."""
        return int(self._starts[-1])

    def batch(self, step: int) -> list[Pick]:
        """The global batch of a step, 0-based."""
        return list(self.picks(step * self.batch_size, self.batch_size))

    def pick(self, position: int) -> Pick:
        """The sample at a place of the stream."""
        [pick] = self.picks(position, 1)
        return pick

    def picks(self, first: int, count: int) -> Picks:
        """`count` samples from the place `first` of the stream on."""
        end, size = first + count, self._block_size
        parts = []
        for number in range(first // size, -(-end // size)):
            start = number * size
            parts.append(self._block(number).part(max(first - start, 0), end - start))
        return parts[0] if len(parts) == 1 else Picks.joined(parts or [Picks.of([])])

    def rank_picks(self, step: int, rank: int, ranks: int) -> Picks:
        """A rank's consecutive share of a step's batch, which must divide evenly."""
        _check_share(self.batch_size, ranks)
        share = self.batch_size // ranks
        return self.picks(step * self.batch_size + rank * share, share)

    def step_draw(self, step: int) -> float:
        """A uniform draw in [0, 1) that belongs to a whole step of this task."""
        return mix(self._key, step, _STEP_SALT) * 2.0**-64

    def _block(self, number: int) -> Picks:
        block = self._blocks.get(number)
        if block is None:
            size = self._block_size
            block = self._computed(np.arange(number * size, (number + 1) * size))
            # A new dictionary, since another thread may read the old one.
            kept = list(self._blocks.items())[1 - _BLOCKS_KEPT :]
            self._blocks = dict([*kept, (number, block)])
        return block

    def _computed(self, positions: np.ndarray) -> Picks:
        if self._deal is None:
            index = self._epochs[0].items(positions, self._key, ())
            corpus = np.searchsorted(self._starts, index, side="right") - 1
            item = index - self._starts[corpus]
        else:
            corpus, occurrence = self._deal(positions)
            item = np.empty_like(positions)
            for number, epochs in enumerate(self._epochs):
                mine = corpus == number
                item[mine] = epochs.items(occurrence[mine], self._key, (number,))
        draws = [self._draws(positions, salt) for salt in _SAMPLE_SALTS]
        return Picks(corpus, item, *draws)

    def _draws(self, positions: np.ndarray, salt: int) -> np.ndarray:
        # mix(key, position, salt): both forms apply "xor the next value, then stir" in turn.
        hashed = mixed(salt, mixed(mix(self._key), positions))
        return hashed.astype(np.float64) * 2.0**-64


class _Epochs:
    """Permutations of the same items, one an epoch, each whole or window by window."""

    def __init__(self, count: int, window: int | None, shards: np.ndarray) -> None:
        self._count, self._window = count, window
        self._sizes = shards
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._tour = lru_cache(maxsize=2)(self._new_tour)

    def __reduce__(self) -> tuple[type, tuple[int, int | None, np.ndarray]]:
        # A remembered tour stays behind.
        return _Epochs, (self._count, self._window, self._sizes)

    def items(self, positions: np.ndarray, key: int, salts: tuple[int, ...]) -> np.ndarray:
        """The items at ascending positions of the endless row of epochs, int64."""
        epochs, places = np.divmod(positions, self._count)
        keys = mixed(mix(key), epochs)
        for salt in salts:
            keys = mixed(salt, keys)
        if self._window is None:
            one_epoch = len(keys) > 0 and epochs[0] == epochs[-1]
            return permuted_all(places, self._count, keys[0] if one_epoch else keys)
        result = np.empty_like(positions)
        for epoch_key in np.unique(keys).tolist():
            mine = keys == epoch_key
            result[mine] = self._windowed(places[mine], epoch_key)
        return result

    def _windowed(self, places: np.ndarray, key: int) -> np.ndarray:
        """The items at places of the epoch that has this key."""
        assert self._window is not None
        shards, starts = self._tour(key)
        edges = np.append(starts[: -1 : self._window], starts[-1])
        windows = np.searchsorted(edges, places, side="right") - 1
        # Salted, so that no window repeats the permutation of the shards.
        keys = mixed(mix(key, 1), windows)
        sizes = np.diff(edges)[windows]
        shuffled = edges[windows] + permuted_all(places - edges[windows], sizes, keys)
        visit = np.searchsorted(starts, shuffled, side="right") - 1
        return self._firsts[shards[visit]] + shuffled - starts[visit]

    def _new_tour(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in their order of this epoch, and where each begins, with the end."""
        shards = permuted_all(np.arange(len(self._sizes)), len(self._sizes), mix(key, 0))
        return shards, np.concatenate([[0], np.cumsum(self._sizes[shards])])


class _Deal:
    """`dealt` of arrays of positions, from a table of one period."""

    def __init__(self, shares: Sequence[int]) -> None:
        self._shares = np.array(shares, np.int64)
        self._period = int(self._shares.sum())
        self._owner, self._before = _deal_table(tuple(shares))

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Who owns each position, and how many it owned before."""
        period, place = np.divmod(positions, self._period)
        owner = self._owner[place]
        return owner, period * self._shares[owner] + self._before[place]


@lru_cache(maxsize=16)
def _deal_table(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`dealt` of every position of one period."""
    left = sum(shares)
    owners, counts = np.full(left, -1), np.zeros(left, np.int64)
    places = positions = np.arange(left)
    for owner, share in enumerate(shares):
        before = positions * share // left
        taken = (positions + 1) * share // left > before
        owners[places[taken]], counts[places[taken]] = owner, before[taken]
        places, positions = places[~taken], (positions - before)[~taken]
        left -= share
    return owners, counts


def _checked_shards(
    window: int, shards: Sequence[Sequence[int] | np.ndarray] | None, sizes: Sequence[int]
) -> list[np.ndarray]:
    if window < 1:
        raise ValueError(f"shuffle_window must be at least 1, not {window}")
    found = [np.asarray(own, np.int64) for own in shards or []]
    if [int(own.sum()) for own in found] != list(sizes):
        raise ValueError("shuffle_window needs shard_sizes that add up to the corpora's sizes")
    if any((own < 1).any() for own in found):
        raise ValueError("shard_sizes must be at least 1 each")
    return found


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
    _check_share(len(batch), ranks)
    share = len(batch) // ranks
    return batch[rank * share : (rank + 1) * share]


def _check_share(size: int, ranks: int) -> None:
    if size % ranks:
        raise ValueError(f"a batch of {size} does not divide by {ranks} ranks")
