"""Every command: its help shows how it is called, and a wrong argument is one sentence."""

from __future__ import annotations

import importlib
import sys

import pytest

from megatron_nuwa.errors import run_command

LAUNCHED = "deepspeed [launcher options] launch"
SCRIPTS = {
    "launch.export": "python launch/export.py",
    "launch.generate": "python launch/generate.py",
    "launch.import_vqgan": "python launch/import_vqgan.py",
    "launch.preflight": f"{LAUNCHED}/preflight.py",
    "launch.pretrain": f"{LAUNCHED}/pretrain.py",
    "launch.supervise": "python launch/supervise.py",
    "launch.train_vqgan": f"{LAUNCHED}/train_vqgan.py",
}
PACKAGES = (
    "launch.demo",
    "launch.moving_digits",
    "megatron_nuwa.generation.app",
    "megatron_nuwa.ops",
    "megatron_nuwa.plan",
    "preprocessing",
)
MODULES = (
    "launch.demo.media",
    "launch.demo.report",
    "launch.moving_digits.media",
    "launch.moving_digits.report",
    "launch.moving_digits.scorer",
)
BENCHMARKS = (
    "checkpoint_stall",
    "cuda_resources",
    "decoding",
    "encoding",
    "farm",
    "generation",
    "kernel_layouts",
    "loader",
    "model_step",
    "nearby_attention",
    "nearby_kernels",
    "real_step",
    "step_overhead",
    "step_parts",
    "tokenizers",
)
CORPUS_COMMANDS = ("tokenize", "shots", "verify", "stats", "merge", "split", "train-bpe")
COMMANDS = {
    **SCRIPTS,
    **{f"{name}.__main__": f"python -m {name}" for name in PACKAGES},
    **{name: f"python -m {name}" for name in MODULES},
    **{f"benchmarks.{name}": f"python -m benchmarks.{name}" for name in BENCHMARKS},
}


def run(module: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        return run_command(main)
    except SystemExit as ending:
        return int(ending.code or 0)


@pytest.mark.parametrize(("module", "typed"), COMMANDS.items(), ids=list(COMMANDS))
def test_help_says_how_it_is_typed_with_an_example(
    module: str, typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(module, monkeypatch, "--help") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {typed} [-h]")
    name = typed.rpartition(" ")[2]
    assert name in told.split("example:\n")[1]


@pytest.mark.parametrize("command", CORPUS_COMMANDS)
def test_help_of_a_corpus_command_says_how_it_is_typed_with_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("preprocessing.__main__", monkeypatch, command, "--help") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m preprocessing {command} [-h]")
    assert f"python -m preprocessing {command} " in told.split("example:\n")[1]


@pytest.mark.parametrize("module", COMMANDS)
def test_an_argument_that_is_none_is_one_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(module, monkeypatch, "--no-such-option") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        ("decoding", ["--frames", "0"], "--frames must be at least 1, not 0"),
        ("decoding", ["--rounds", "x"], "--rounds must be a whole number of at least 1, not x"),
        ("checkpoint_stall", ["--folder", "/nowhere"], "--folder must be an existing folder"),
        ("loader", ["--seconds", "-1"], "--seconds must be a number above 0, not -1"),
        ("encoding", ["--window", "0"], "--window must be a number above 0, not 0"),
        ("farm", ["--repeats", "-1"], "--repeats must be a whole number of at least 0, not -1"),
        ("step_overhead", ["--limit", "much"], "--limit must be a number of at least 0, not much"),
        ("real_step", ["--images", "-1"], "--images must be a whole number of at least 0, not -1"),
        ("tokenizers", ["--seeds", "0", "x"], "--seeds must be a whole number of at least 0"),
        *(
            (name, ["--output", "/dev/null/a.json"], "--output must be where one can write, not ")
            for name in BENCHMARKS
            if name != "step_parts"
        ),
    ],
)
def test_benchmarks_check_their_arguments_before_they_measure(
    module: str,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(f"benchmarks.{module}", monkeypatch, *arguments) == 2
    assert sentence in capsys.readouterr().err
