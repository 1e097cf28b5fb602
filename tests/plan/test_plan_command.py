"""The command as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_command_line

RECIPE = "launch/recipes/nuwa_870m.yaml"


def plan(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_command_line(sys.executable, "-m", "megatron_nuwa.plan", *arguments)


def test_the_command_prints_tables_and_writes_json(tmp_path: Path) -> None:
    output, layout = tmp_path / "plan.json", tmp_path / "pp4.json"
    layout.write_text(
        json.dumps(
            {
                "parallel": {"pipeline": 4},
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            }
        )
    )
    options = ("--gpus", "8", "--device", "a100-40gb", "--deepspeed_config", layout)
    done = plan(RECIPE, *options, "--json", output, "schedule.steps=1000000")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("869.5", "63.2", "15.7", "t2v", "Pipeline stages", "pp4_tp1_dp2_zero1_bf16"):
        assert words in done.stdout
    assert "Layouts of 8 × a100-40gb that fit, the fastest first" in done.stdout
    report = json.loads(output.read_text())
    assert set(report) == {
        "recipe",
        "device",
        "gpus",
        "gpus_per_node",
        "device_memory",
        "schedule_steps",
        "warmup_steps",
        "parameters",
        "tasks",
        "tokens_per_step",
        "chosen",
        "candidates",
    }
    chosen = report["chosen"]
    assert chosen["layout"] == "pp4_tp1_dp2_zero1_bf16"
    assert (report["schedule_steps"], report["warmup_steps"]) == (1_000_000, 50_000)
    assert chosen["gpu_hours"] == pytest.approx(1e6 * chosen["timing"]["step"] * 8 / 3600)
    warm_up = chosen["timing"]["step"] * 50_000 / 86_400
    assert warm_up > 0.1
    assert f"ends after 50,000 steps, {warm_up:.1f} days" in done.stdout
    parts = {part: size for part, size in chosen["memory"].items() if part not in ("total", "host")}
    assert sum(parts.values()) == chosen["memory"]["total"]
    assert all(set(candidate) == set(chosen) for candidate in report["candidates"])
    forward = sum(task["forward"] for task in report["tasks"].values())
    assert chosen["flops"]["forward"] == forward
    assert chosen["flops"]["backward"] == 2 * forward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", "8", "--device", "a100-80g"), "did you mean 'a100-80gb'?"),
        (("--gpus", "0", "--device", "cpu"), "--gpus must be a whole number of at least 1"),
        (("--gpus", "48", "--device", "cpu"), "does not divide by 48"),
        (("--gpus", "1", "--device", "cpu", "model.heads=7"), "not a multiple of model.heads 7"),
        (("--gpus", "1", "--device", "cpu", "data=null"), "has no section 'data'"),
    ],
    ids=["device", "gpus", "batch", "model", "section"],
)
def test_a_mistake_is_one_sentence(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from megatron_nuwa.errors import run_command
    from megatron_nuwa.plan.__main__ import main

    output = tmp_path / "plan.json"
    assert run_command(lambda: main([RECIPE, *options, "--json", str(output)])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not output.exists()


def test_help_has_an_example() -> None:
    done = plan("--help")
    assert done.returncode == 0
    assert "--gpus 64 --device a100-80gb" in done.stdout


def test_a_folder_in_place_of_the_json_file_is_named(tmp_path: Path) -> None:
    done = plan("launch/recipes/demo.yaml", "--gpus", "1", "--device", "cpu", "--json", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --json must be a file, not the folder {tmp_path}")
    assert "Traceback" not in done.stderr
