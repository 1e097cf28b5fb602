"""Reading again what could not be read, because storage of many machines stumbles now and then."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from megatron_nuwa.errors import UnreadableError

T = TypeVar("T")
# Seconds before each further attempt: together longer than a server's usual failover, and far
# shorter than training.hang_seconds.
PAUSES = (0.2, 1.0, 5.0, 15.0)


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns, which is called again after a pause while it raises `UnreadableError`.

    Every further attempt is announced on stderr; the last one's error is raised.
    """
    for pause in PAUSES:
        try:
            return read()
        except UnreadableError as error:
            print(
                f"warning: {socket.gethostname()}: {error}; trying again in {pause:g} s",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(pause)
    return read()
