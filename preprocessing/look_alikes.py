"""Which of many items look alike, by their perceptual hashes, without comparing all with all.

Hashes that differ in at most d of 64 bits, cut into d + m bands, agree in at least m bands. So each
choice of m bands is a key, items are sorted by it, and only those of equal keys are compared.

Halves are worked through one after the other, and of the second only what looks like nothing that
stays of the first is compared among itself: however many items look like each other, few stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

HASH_BITS = 64
# So many rows are compared at once, whatever they look like.
_LEAF = 1024
# Of larger groups of equal keys, only those that agree in a key of the next hash are compared.
_LARGE_GROUP = 32
_MOST_KEYS = 512
_PAIRS_AT_ONCE = 1 << 20
# Sorting an item costs about as much as comparing so many.
_SORT_COST = 8
# How many bits are 1 in each number of 16 bits.
_BITS = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16)
_ONES = _BITS.sum(1, dtype=np.uint8)
# A band takes its bits from all over the picture: an edge that is black is in no band alone.
_SCATTERED = np.random.Generator(np.random.PCG64(0)).permutation(HASH_BITS)


def originals_of(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The earlier item that each item looks like, int64 (items,); -1 for those that stay.

    Two items of `hashes`, uint64 (items, hashes an item), look alike where each of their hashes
    differs in at most `distance` of 64 bits. An item stays where no earlier one that stays looks
    like it; otherwise it belongs to the first of those. Takes about 200 bytes an item.
    Time grows little faster than the number of items, but for distances above 5 or so, and for
    pictures that are nearly blank.
    """
    kinds, first, kind_of = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    # In the order of the items, which decides who is whose original.
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    first, kind_of = first[order], place[kind_of.reshape(-1)]
    kept = _Search(kinds[order], distance).originals()
    # Whoever has the very hashes of an earlier item has its fate, or has it as its original.
    kept = np.where(kept < 0, np.arange(len(first)), kept)
    originals = first[kept][kind_of]
    originals[originals == np.arange(len(hashes))] = -1
    return originals


class _Search:
    """Originals among items of different hashes."""

    def __init__(self, hashes: np.ndarray, distance: int) -> None:
        self._distance = distance
        columns = range(hashes.shape[1])
        # An image has the same hash three times.
        if all((hashes[:, column] == hashes[:, 0]).all() for column in columns):
            columns = range(1)
        # First and last frames are black more often than those of the middle.
        middle_first = sorted(columns, key=lambda column: column != len(columns) // 2)
        self._hashes = np.ascontiguousarray(hashes[:, middle_first].T)
        self._found = np.full(len(hashes), -1, np.int64)

    def originals(self) -> np.ndarray:
        """The first row that stays among those that each is alike with; -1 for those that stay."""
        self._settle(np.arange(len(self._found)))
        return self._found

    def _settle(self, rows: np.ndarray) -> None:
        """Find the originals of rows, in their order, of which none is alike with earlier ones."""
        if not len(rows):
            return
        if len(rows) <= _LEAF:
            late, early = self._alike(rows, np.ones(len(rows), bool))
            for one, other in zip(late.tolist(), early.tolist(), strict=True):
                if self._found[one] < 0 and self._found[other] < 0:
                    self._found[one] = other
            return
        first, second = np.array_split(rows, 2)
        self._settle(first)
        stay = first[self._found[first] < 0]
        is_late = np.arange(len(stay) + len(second)) >= len(stay)
        late, early = self._alike(np.concatenate([stay, second]), is_late)
        late, firsts = np.unique(late, return_index=True)
        self._found[late] = early[firsts]
        self._settle(second[self._found[second] < 0])

    def _alike(self, rows: np.ndarray, is_late: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All pairs that look alike, sorted: the later row of each, and the earlier.

        Where some rows are not late, pairs are of one that is late and one that is not.
        """
        found = [np.empty((0, 2), np.int64)]
        none = np.zeros(len(rows), np.uint64)
        agreeing = _bands_to_agree(len(rows), self._distance)
        for one, other in self._candidates(0, rows, is_late, none, agreeing):
            alike = np.ones(len(one), bool)
            for column in self._hashes:
                differing = column[one] ^ column[other]
                alike &= _ONES[differing.view(np.uint16)].reshape(-1, 4).sum(1) <= self._distance
            one, other = one[alike], other[alike]
            found.append(np.stack([np.maximum(one, other), np.minimum(one, other)], axis=1))
        pairs = np.concatenate(found)
        late, early = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T
        return late, early

    def _candidates(
        self, level: int, rows: np.ndarray, is_late: np.ndarray, group: np.ndarray, agreeing: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of rows of one group that agree in `agreeing` bands of their hash at `level`."""
        is_last = level == len(self._hashes) - 1
        for key in _keys(self._hashes[level][rows], self._distance, agreeing):
            groups = _Groups.of(group, key, is_late)
            large = groups.sizes > (len(rows) if is_last else _LARGE_GROUP)
            for one, other in groups.where(~large).pairs():
                yield rows[one], rows[other]
            if large.any():
                rest = groups.where(large)
                numbers = np.repeat(np.arange(len(rest.sizes)), rest.sizes).astype(np.uint64)
                members = rest.order
                yield from self._candidates(level + 1, rows[members], is_late[members], numbers, 1)


class _Groups(NamedTuple):
    """Groups of rows, one after the other in `order`; of each its size and how many are early."""

    order: np.ndarray
    sizes: np.ndarray
    early: np.ndarray

    @classmethod
    def of(cls, group: np.ndarray, key: np.ndarray, is_late: np.ndarray) -> _Groups:
        """Rows of equal group and key, the early ones first; groups without pairs are left out."""
        order = np.lexsort((is_late, key, group))
        group, key = group[order], key[order]
        changes = np.flatnonzero((group[1:] != group[:-1]) | (key[1:] != key[:-1])) + 1
        starts = np.concatenate([[0], changes])
        sizes = np.diff(np.concatenate([starts, [len(order)]]))
        early = np.add.reduceat((~is_late[order]).astype(np.int64), starts)
        has_pairs = (sizes > 1) & (early < sizes)
        if not is_late.all():
            has_pairs &= early > 0
        return cls(order, sizes, early).where(has_pairs)

    def where(self, wanted: np.ndarray) -> _Groups:
        """Some of the groups."""
        order = self.order[np.repeat(wanted, self.sizes)]
        return _Groups(order, self.sizes[wanted], self.early[wanted])

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each late row with the early ones of its group; where there are none, with those before.

        A few million pairs at a time.
        """
        starts = np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        places = np.arange(len(self.order))
        early = np.repeat(self.early, self.sizes)
        partners = np.where(early > 0, early, places - starts)
        partners[places - starts < early] = 0
        ends = np.cumsum(partners)
        first = 0
        while first < len(places):
            done = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE)))
            counts = partners[first:last]
            one = np.repeat(places[first:last], counts)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            yield self.order[one], self.order[starts[one] + within]
            first = last


def _bands_to_agree(count: int, distance: int) -> int:
    """How many bands make a key, so that sorting and comparing together cost least."""

    def cost(agreeing: int) -> float:
        keys = math.comb(distance + agreeing, agreeing)
        bits = HASH_BITS * agreeing / (distance + agreeing)
        return keys * (_SORT_COST + count / 2**bits)

    choices = [m for m in range(1, 5) if math.comb(distance + m, m) <= _MOST_KEYS]
    return min(choices, key=cost)


def _keys(hashes: np.ndarray, distance: int, agreeing: int) -> Iterator[np.ndarray]:
    """For each choice of bands their bits of each hash, uint64, the others 0."""
    count = distance + agreeing
    edges = [HASH_BITS * n // count for n in range(count + 1)]
    bands = [sum(1 << int(bit) for bit in _SCATTERED[low:high]) for low, high in pairwise(edges)]
    for chosen in combinations(bands, agreeing):
        yield hashes & np.uint64(sum(chosen))
