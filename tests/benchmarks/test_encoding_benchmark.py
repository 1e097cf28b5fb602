"""The encoder's benchmark: every way is timed or says why not, on what a bare GPU node has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_command_line

from benchmarks import encoding
from benchmarks.encoding import main, ways

WITHOUT = "deepspeed", "mpi4py", "ffmpeg", "imageio_ffmpeg", "av"
CODE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(","), None))
from benchmarks.encoding import main
sys.exit(main())
"""


def test_a_quick_run_needs_no_farm_and_writes_figures(tmp_path: Path) -> None:
    output = tmp_path / "encoding.json"
    done = run_command_line(
        *(sys.executable, "-c", CODE, ",".join(WITHOUT), "--recipe", "launch/recipes/demo.yaml"),
        *("--batch-sizes", "4", "2", "--window", "0.05", "--output", output),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    rows = report["ways"]
    assert [row["way"]["batch"] for row in rows] == [4, 2, 4, 4]
    for row in rows:
        assert row["flops"] == pytest.approx(row["frames_per_second"] * report["flops_a_frame"])
        assert row["flops"] > 0
        # No maker publishes a processor's peak, and a measured one depends on its neighbours.
        assert row["mfu"] is None
        assert row["alike"] == 1 or row["way"]["precision"] == "bfloat16"


def test_ways_that_no_time_is_left_for_are_named(tmp_path: Path) -> None:
    output = tmp_path / "encoding.json"
    recipe = "launch/recipes/demo.yaml"
    quick = ["--recipe", recipe, "--batch-sizes", "2", "--window", "0.01", "--seconds", "0"]
    assert main([*quick, "--output", str(output)]) == 0
    first, *others = json.loads(output.read_text())["ways"]
    assert first["reason"] is None
    assert {row["reason"] for row in others} == {"the 0 s were used up"}


def test_a_gpu_is_measured_as_the_farm_uses_it_once_it_was_without_a_compiler() -> None:
    eager, plain, first, *others = ways([64, 128], cuda=True, compiled=True)
    assert (eager.compiled, first.compiled) == (False, True)
    for way in (eager, first):
        assert way.channels_last
        assert way.precision == "bfloat16"
        assert not way.searched
    assert (plain.compiled, plain.precision, plain.channels_last) == (False, "float32", False)
    assert all(way.compiled for way in others)


def test_mfu_is_of_the_cards_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12, "Tesla T4": None}
    for name, expected in names.items():
        monkeypatch.setattr(encoding, "device_name", lambda device, name=name: name)
        peaks = encoding._peaks(torch.device("cuda"))
        assert peaks.get("bfloat16") == expected
