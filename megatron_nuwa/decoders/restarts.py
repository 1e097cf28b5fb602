"""Decoders that something outside kills, which says nothing of the file: it is decoded again."""

from __future__ import annotations

import signal

# How often a file's decoder is started while it is killed each time.
STARTS = 3
# From the system, where memory runs short, from whoever tidies up, or from whoever asks all of a
# job's processes to stop. A library crashes otherwise. (ffmpeg catches the second, and ends as if
# it had met something in the file.)
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


def was_killed(code: int) -> bool:
    """Whether a process's exit code says that something outside has ended it."""
    return -code in _FROM_OUTSIDE
