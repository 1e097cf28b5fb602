"""The farm's memory does not grow with the number of its items."""

from __future__ import annotations

from pathlib import Path

import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from resident_memory import MIB, forget_highest_memory, highest_memory

from preprocessing.__main__ import main


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
