"""How much memory this process has had at most."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

MIB = 2**20


def highest_memory() -> int:
    """Bytes that were resident at most since `forget_highest_memory`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_highest_memory() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let this process forget its highest memory")
