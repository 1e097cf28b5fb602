"""The benchmark of a step's overhead measures the real loop, and its parts add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from benchmarks import step_overhead


@pytest.fixture
def small_demo(tmp_path: Path) -> Path:
    """The demo's recipe with a model of milliseconds."""
    tree = yaml.safe_load((ROOT / "launch/recipes/demo.yaml").read_text())
    tree["model"] |= {"width": 16, "encoder_layers": 1, "decoder_layers": 1}
    tree["training"]["log_every"] = 2
    for task in tree["data"]["tasks"].values():
        task["batch_size"] = 2
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_parts_of_a_step_add_up_and_the_limit_decides(
    small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    common = ["--recipe", str(small_demo), "--steps", "4"]
    assert step_overhead.main([*common, "--output", str(output), "--limit", "1"]) == 0
    report = json.loads(output.read_text())
    parts = report["parts_ms"]
    assert set(parts) == {step_overhead.MODEL, *step_overhead.OUTSIDE, step_overhead.READING}
    assert all(milliseconds > 0 for milliseconds in parts.values())
    of_step = sum(parts.values()) - parts[step_overhead.READING]
    assert of_step == pytest.approx(report["step_ms"])
    assert report["outside_model"] == pytest.approx(1 - parts[step_overhead.MODEL] / of_step)
    assert step_overhead.MODEL in capsys.readouterr().out
    assert step_overhead.main([*common, "--limit", "0"]) == 1
