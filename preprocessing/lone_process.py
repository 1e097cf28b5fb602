"""A process of its own for one request, so that what ends it ends nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nuwa.decoders import DecodeError
from preprocessing.sources.items import Media

_DIE_WITH_PARENT = 1


def ask_alone(
    module: str, request: Mapping[str, Any], media: Media, timeout: float | None
) -> bytes:
    """What `python -m module` answers to a request; `DecodeError` where the medium ends it."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DecodeError(f"{media} took longer than {timeout:g} s to decode") from error
    if done.returncode == 0:
        return done.stdout
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
    raise DecodeError(f"{media} ends the process that decodes it ({how})")


def read_request() -> Any:
    """In the lone process: what it is asked."""
    with contextlib.suppress(OSError, AttributeError):
        # On Linux: work that nobody waits for any more would go on for as long as a film takes.
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    # Where memory runs out, the system should end this process and not the farm.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    return json.load(sys.stdin)
