"""Which captions belong to which item, group by group, in a bounded number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

# What an array and its place in a dictionary take beside its numbers.
_ARRAY_BYTES, _PLACE_BYTES = 112, 144


class CaptionBounds:
    """Where the captions of each item of a group begin, with the end: unsigned (items + 1,).

    `counts` says how many items and captions a group has, `read` finds out its bounds. What
    `most_bytes` cannot hold is forgotten, what was asked for longest ago first.
    """

    def __init__(
        self,
        counts: Callable[[int], tuple[int, int]],
        read: Callable[[int], np.ndarray],
        most_bytes: Callable[[], int],
    ) -> None:
        self._counts, self._read, self._most_bytes = counts, read, most_bytes
        self._held: OrderedDict[int, np.ndarray] = OrderedDict()
        self._one_each: dict[int, np.ndarray] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def of(self, group: int) -> np.ndarray:
        """The bounds of a group."""
        try:
            self._held.move_to_end(group)
            return self._held[group]
        except KeyError:
            return self._found(group)

    def _found(self, group: int) -> np.ndarray:
        items, captions = self._counts(group)
        if items == captions:
            # Every item has a caption, so none has two: all such groups share an array.
            every = np.arange(items + 1, dtype=np.min_scalar_type(items))
            bounds = self._one_each.setdefault(items, every)
        else:
            bounds = self._read(group).astype(np.min_scalar_type(captions))
        with self._lock:
            if group not in self._held:
                self._held[group] = bounds
                self._bytes += self._size(bounds)
            while self._bytes > self._most_bytes() and len(self._held) > 1:
                self._bytes -= self._size(self._held.popitem(last=False)[1])
        return bounds

    def _size(self, bounds: np.ndarray) -> int:
        is_shared = self._one_each.get(len(bounds) - 1) is bounds
        return _PLACE_BYTES + (0 if is_shared else _ARRAY_BYTES + bounds.nbytes)
