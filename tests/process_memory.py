"""What memory a process has of its own."""

from __future__ import annotations

from pathlib import Path

import pytest


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
