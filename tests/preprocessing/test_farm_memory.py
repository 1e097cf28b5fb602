"""The farm's memory does not grow with the number of its items."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest

from preprocessing.__main__ import main

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


def test_ten_times_the_items_need_no_more_memory(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {}
    # The first run only warms up what a process allocates once.
    for name, count in (("warm", 200), ("few", 200), ("many", 2000)):
        rows: list[dict[str, object]] = [
            {"id": n, "media": f"image{n % 6}.png", "captions": CAPTIONS} for n in range(count)
        ]
        manifest = write_manifest(media / f"{name}.jsonl", rows)
        forget_highest_memory()
        more = ("--items-per-shard", "50")
        assert main(tokenize_command(manifest, tmp_path / name, tools, *more)) == 0
        peaks[name] = highest_memory()
    # 1,800 more items of 3 KiB of pixels and as much of the rest would need 10 MiB.
    assert peaks["many"] - peaks["few"] < 4 * MIB
