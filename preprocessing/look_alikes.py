"""Which of many items look alike, by their perceptual hashes, without comparing all with all.

Hashes that differ in at most d of 64 bits, cut into d + m bands, agree in at least m bands. So each
choice of m bands is a key, items are sorted by it, and only those of equal keys are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np

HASH_BITS = 64
# Of larger groups of equal keys, only those that agree in a key of the next hash are compared.
_LARGE_GROUP = 32
_MOST_KEYS = 512
# Sorting an item costs about as much as comparing so many.
_SORT_COST = 8
# How many bits are 1 in each number of 16 bits.
_BITS = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16)
_ONES = _BITS.sum(1, dtype=np.uint8)


def originals_of(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The earlier item that each item looks like, int64 (items,); -1 for those that stay.

    Two items of `hashes`, uint64 (items, hashes an item), look alike where each of their hashes
    differs in at most `distance` of 64 bits. An item stays where no earlier one that stays looks
    like it; otherwise it belongs to the first of those. Takes about 200 bytes an item.
    """
    kinds, first, kind_of = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    # In the order of the items, which decides who is whose original.
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    first, kind_of = first[order], place[kind_of.reshape(-1)]
    kind_original = _first_kept(len(first), _alike_pairs(kinds[order], distance))
    # Whoever has the very hashes of an earlier item has its fate, or has it as its original.
    kept = np.where(kind_original < 0, np.arange(len(first)), kind_original)
    originals = first[kept][kind_of]
    originals[originals == np.arange(len(hashes))] = -1
    return originals


def _first_kept(count: int, pairs: np.ndarray) -> np.ndarray:
    """The first that stays among those that each is alike with; `pairs` are sorted by the later."""
    found = [-1] * count
    for later, earlier in pairs.tolist():
        if found[later] < 0 and found[earlier] < 0:
            found[later] = earlier
    return np.array(found, np.int64)


def _alike_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs (later, earlier) that look alike, int64 (pairs, 2), sorted."""
    found = [np.empty((0, 2), np.int64)]
    for one, other in _candidates(hashes, distance):
        alike = np.ones(len(one), bool)
        for column in range(hashes.shape[1]):
            differing = hashes[one, column] ^ hashes[other, column]
            alike &= _ONES[differing.view(np.uint16)].reshape(-1, 4).sum(1) <= distance
        one, other = one[alike], other[alike]
        found.append(np.stack([np.maximum(one, other), np.minimum(one, other)], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _candidates(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows, every pair that looks alike among them at least once."""
    # First and last frames are black more often than those of the middle.
    columns = sorted(range(hashes.shape[1]), key=lambda column: column != hashes.shape[1] // 2)
    rows, group = np.arange(len(hashes)), np.zeros(len(hashes), np.uint64)
    yield from _within(hashes[:, columns], rows, group, distance, _bands_to_agree(rows, distance))


def _within(
    hashes: np.ndarray, rows: np.ndarray, group: np.ndarray, distance: int, agreeing: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows of one group that agree in `agreeing` bands of their first hash."""
    is_last = hashes.shape[1] == 1
    for key in _keys(hashes[rows, 0], distance, agreeing):
        order, sizes = _sorted_groups(group, key)
        large = sizes > (len(rows) if is_last else _LARGE_GROUP)
        for one, other in _neighbours(sizes, ~large):
            yield rows[order[one]], rows[order[other]]
        if large.any():
            members = order[np.repeat(large, sizes)]
            groups = np.repeat(np.arange(large.sum()), sizes[large]).astype(np.uint64)
            yield from _within(hashes[:, 1:], rows[members], groups, distance, 1)


def _bands_to_agree(rows: np.ndarray, distance: int) -> int:
    """How many bands make a key, so that sorting and comparing together cost least."""

    def cost(agreeing: int) -> float:
        keys = math.comb(distance + agreeing, agreeing)
        bits = HASH_BITS * agreeing / (distance + agreeing)
        return keys * len(rows) * (_SORT_COST + len(rows) / 2**bits)

    choices = [m for m in range(1, 5) if math.comb(distance + m, m) <= _MOST_KEYS]
    return min(choices, key=cost)


def _keys(hashes: np.ndarray, distance: int, agreeing: int) -> Iterator[np.ndarray]:
    """For each choice of bands their bits of each hash, uint64, the others 0."""
    count = distance + agreeing
    edges = [HASH_BITS * n // count for n in range(count + 1)]
    masks = [((1 << high) - (1 << low)) for low, high in pairwise(edges)]
    for chosen in combinations(masks, agreeing):
        yield hashes & np.uint64(sum(chosen))


def _sorted_groups(group: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order in which rows of equal group and key are neighbours, and how many there are each."""
    order = np.lexsort((key, group))
    group, key = group[order], key[order]
    changes = np.flatnonzero((group[1:] != group[:-1]) | (key[1:] != key[:-1])) + 1
    edges = np.concatenate([[0], changes, [len(order)]])
    return order, np.diff(edges)


def _neighbours(sizes: np.ndarray, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places within the groups that are wanted, those of one distance at a time."""
    left = np.repeat(np.cumsum(sizes), sizes) - np.arange(sizes.sum())
    places = np.flatnonzero(np.repeat(wanted & (sizes > 1), sizes))
    step = 1
    while len(places := places[left[places] > step]):
        yield places, places + step
        step += 1
