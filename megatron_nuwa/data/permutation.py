"""Hashes and permutations that are pure functions of a few integers, alone and over arrays."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64, chained)."""
    state = 0
    for value in values:
        state = (state ^ (value & _WORD)) & _WORD
        state = (state + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * _FIRST) & _WORD
        state = ((state ^ (state >> 27)) * _SECOND) & _WORD
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


def mixed(prefix: int | np.ndarray, values: np.ndarray) -> np.ndarray:
    """`mix(*earlier, value)` of every value, `prefix` being `mix(*earlier)`: uint64, as many."""
    state = np.array(values, np.uint64)
    state ^= np.asarray(prefix, np.uint64)
    state += np.uint64(_GOLDEN)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        state ^= state >> np.uint64(shift)
        # Of an array without dimensions NumPy would warn that the product wraps, as it is to.
        np.multiply(state, np.uint64(factor), out=state)
    state ^= state >> np.uint64(31)
    return state


def permuted_all(
    positions: np.ndarray, counts: int | np.ndarray, keys: int | np.ndarray
) -> np.ndarray:
    """`permuted` of every position, with one count and key for all or for each: int64, as many."""
    result = positions.astype(np.uint64)
    counts = np.asarray(counts, np.uint64)
    hashed_keys = mixed(0, np.asarray(keys, np.uint64))
    prefixes = [mixed(round_number, hashed_keys) for round_number in range(_ROUNDS)]
    # The binary exponent of a whole number is its bit length.
    lengths = np.frexp((counts - np.uint64(1)).astype(np.float64))[1]
    halves = (np.maximum(lengths + 1, 2) // 2).astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        current, half = result[walking], _of(halves, walking)
        low = (np.uint64(1) << half) - np.uint64(1)
        left, right = current >> half, current & low
        for prefix in prefixes:
            left, right = right, left ^ (mixed(_of(prefix, walking), right) & low)
        current = (left << half) | right
        result[walking] = current
        walking = walking[current >= _of(counts, walking)]
    return result.astype(np.int64)


def _of(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    return values[places] if values.ndim else values
