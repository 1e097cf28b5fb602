"""What a positive figure usually is, and whether a new value jumps above it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

# A value must also lie this many robust standard deviations above the level, so that a figure that
# jumps by nature is left alone.
_DEVIATIONS = 6.0
# A normal distribution's standard deviation over the median absolute difference of two draws.
_DIFFERENCE_TO_DEVIATION = 1.4826 / math.sqrt(2)


class Levels:
    """The last `window` values of a figure; jumps between values far below `small` do not count."""

    def __init__(self, window: int, small: float, logarithms: Sequence[float] = ()) -> None:
        self._small = small
        self._logarithms = deque(logarithms, maxlen=window)

    def add(self, value: float) -> None:
        """Take in a value."""
        self._logarithms.append(self._logarithm(value))

    def exceeded_by(self, value: float, factor: float) -> float | None:
        """The usual value, where this one is a spike more than `factor` times above it."""
        if not self._logarithms:
            return None
        # From value to value, so that a quickly falling figure does not pass for a noisy one.
        differences = [abs(after - before) for before, after in pairwise(self._logarithms)]
        deviation = _DIFFERENCE_TO_DEVIATION * median(differences or [0.0])
        margin = max(math.log(factor), _DEVIATIONS * deviation)
        usual = median(self._logarithms)
        return self.usual if self._logarithm(value) - usual > margin else None

    @property
    def usual(self) -> float:
        """The median of the values; 0 without any."""
        return math.exp(median(self._logarithms)) - self._small if self._logarithms else 0.0

    @property
    def is_full(self) -> bool:
        """Whether the window holds as many values as it can."""
        return len(self._logarithms) == self._logarithms.maxlen

    def forget(self) -> None:
        """Begin anew."""
        self._logarithms.clear()

    def state(self) -> list[float]:
        """What `logarithms` takes to continue."""
        return list(self._logarithms)

    def _logarithm(self, value: float) -> float:
        """On this scale equal ratios are equal distances."""
        return math.log(max(value, 0.0) + self._small)
