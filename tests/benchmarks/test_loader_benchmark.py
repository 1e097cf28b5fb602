"""The loader benchmark: every loader gives the tokens that were written, or says why not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_command_line

from benchmarks import loader
from benchmarks.harness.loaders import LITDATA, LOADERS, NAIVE, OURS, PACKED, STREAMING, Tokens
from benchmarks.loader import Rate, check, verdicts
from megatron_nuwa.grid import Grid


def test_a_quick_run_compares_loaders_and_writes_json(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.loader", "--output", output]
    options = ["--items", "300", "--batch", "16", "--seconds", "0.1", "--repeats", "1"]
    # So few items in so short a time say little of the ratio.
    options += ["--limit", "5"]
    done = run_command_line(*command, *options, "--loaders", NAIVE, PACKED, LITDATA)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = json.loads(output.read_text())["kinds"]
    assert [(kind["kind"], kind["tokens_an_item"]) for kind in kinds] == [
        ("images", 441),
        ("videos", 4410),
    ]
    for kind in kinds:
        rows = {row["loader"]: row for row in kind["loaders"]}
        assert list(rows) == [OURS, NAIVE, PACKED, LITDATA]
        for name in (OURS, NAIVE, PACKED):
            assert rows[name]["samples_per_second"] > 0
        assert rows[NAIVE]["ours_over_it"] > 5
        assert (rows[LITDATA]["samples_per_second"] is None) == bool(rows[LITDATA]["unavailable"])


def test_aims_decide(capsys: pytest.CaptureFixture[str]) -> None:
    rates = [
        Rate(OURS, 100.0),
        Rate(NAIVE, 5.0),
        Rate(PACKED, 200.0),
        Rate(STREAMING, 101.0),
        Rate(LITDATA, reason="import litdata fails"),
    ]
    assert list(verdicts(rates, 20.0)) == [
        (f"{NAIVE}: the aim of 20 times is reached: 20.00", True),
        (f"{STREAMING}: the aim of 1 times is missed: 0.99", False),
        (f"{LITDATA}: not compared", True),
    ]
    quick = ["--items", "40", "--batch", "4", "--seconds", "0.01", "--repeats", "1"]
    one = ["--kinds", "images", "--loaders", NAIVE]
    assert loader.main([*quick, *one, "--limit", "1e9"]) == 1
    assert "the aim of 1e+09 times is missed" in capsys.readouterr().out


def test_wrong_tokens_stop_the_run(tmp_path: Path) -> None:
    tokens = Tokens.random(Grid(3, 3, 1), 40)
    visual, text = next(LOADERS[OURS](tmp_path, tokens, 4)())
    check((visual, text), tokens, 4)
    visual[2, 5] += 1
    with pytest.raises(RuntimeError, match="came back with other tokens"):
        check((visual, text), tokens, 4)
    with pytest.raises(RuntimeError, match=r"came as torch\.int32"):
        check((visual.to(torch.int32), text), tokens, 4)
