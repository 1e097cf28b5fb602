"""Whether a rank that decodes is well: where nearly everything fails, the machine is to blame."""

from __future__ import annotations

from collections import deque

from megatron_nuwa.errors import UserError

# So many items in a row are looked at, and at most this share of them may fail.
WINDOW = 2000
MOST_FAILURES = 0.98


class Health:
    """The newest results of one decoder.

    A machine without its media or its disk fails far faster than others work, and would claim and
    spoil the whole corpus.
    """

    def __init__(self, most_failures: float = MOST_FAILURES) -> None:
        """`most_failures` 1 allows everything to fail."""
        self._most = most_failures
        self._newest: deque[bool] = deque(maxlen=WINDOW)
        self._failures = 0

    def count(self, failed: bool, host: str, reason: str | None) -> None:
        """Take in one result; `UserError` naming the host where nearly all of the newest failed."""
        if len(self._newest) == WINDOW:
            self._failures -= self._newest[0]
        self._newest.append(failed)
        self._failures += failed
        if len(self._newest) == WINDOW and self._failures > self._most * WINDOW:
            raise UserError(
                f"on {host} {self._failures:,} of the last {WINDOW:,} items failed, so the farm "
                f"has stopped; the last: {reason}. Mend the machine and repeat the command, or "
                "allow it with --most-failures 1"
            )
