"""The benchmark of the farm measures real farms, and its parts add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import farm


def test_parts_of_an_item_add_up_and_the_limit_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    common = ["--clips", "3", "--images", "8", "--repeats", "0"]
    assert farm.main([*common, "--output", str(output), "--limit", "1"]) == 0
    report = json.loads(output.read_text())
    for kind, items in (("clips", 3), ("images", 8)):
        cost = report["overhead"][kind]
        assert cost["items"] == items
        parts = cost["decode_ms"] + cost["encode_ms"]
        assert 0 < parts < parts + cost["captions_ms"] < cost["whole_ms"]
        assert cost["overhead"] == pytest.approx(1 - parts / cost["whole_ms"])
    assert "all else" in capsys.readouterr().out
    assert farm.main([*common, "--limit", "0"]) == 1


@pytest.mark.slow
def test_two_ranks_are_compared_with_one(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    common = ["--clips", "8", "--images", "8", "--repeats", "1", "--limit", "1"]
    assert farm.main([*common, "--speedup", "0", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    one, two = (report["items_per_second"][ranks][0] for ranks in ("1", "2"))
    assert report["two_ranks_to_one"] == [pytest.approx(two / one)]
    assert farm.main([*common, "--speedup", "1e9"]) == 1
