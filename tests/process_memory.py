"""What memory a process has of its own, and how much this one has had at most."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

MIB = 2**20


def own_memory(process: int) -> int:
    """Bytes of a process that no file backs; what it shares with others counts by its share.

    From the page tables: the sums in `/proc/PID/status` may be a quarter of a MiB behind. Raises
    `ProcessLookupError` where the process has ended.
    """
    path = Path(f"/proc/{process}/smaps_rollup")
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("the kernel does not sum up the memory of a process")
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError as error:
        raise ProcessLookupError(process) from error
    if not lines:
        raise ProcessLookupError(process)
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return 1024 * (found["Pss_Anon"] + found["Pss_Shmem"])


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
