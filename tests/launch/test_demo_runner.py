"""The demo's stages and their runner, with real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import run_command_line
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.demo.stages import DEFAULT_OUTPUT, RECIPE, demo_stages
from launch.workflow import runner as workflow_runner
from launch.workflow.display import Display
from launch.workflow.plan import moved
from launch.workflow.runner import Runner, StageError, log_tail, read_record, with_free_port
from launch.workflow.stage import Stage
from megatron_nuwa.errors import UserError
from megatron_nuwa.training.recipe import load_recipe


def test_every_input_of_a_stage_is_written_by_an_earlier_one() -> None:
    written = {RECIPE, Path("launch/demo/catalogue.yaml"), Path("demo-media.txt")}
    written |= {Path("launch/demo/report.html.j2")}
    for stage in demo_stages(DEFAULT_OUTPUT):
        assert set(stage.inputs) <= written
        written |= set(stage.outputs)


def test_another_output_folder_is_passed_on_to_every_command() -> None:
    assert list(moved(RECIPE, DEFAULT_OUTPUT, DEFAULT_OUTPUT)) == []
    recipe = load_recipe(RECIPE, list(moved(RECIPE, DEFAULT_OUTPUT, Path("elsewhere"))))
    assert "runs/" not in recipe.model_dump_json()
    for stage in demo_stages(Path("elsewhere")):
        for command in stage.commands:
            assert "elsewhere" in " ".join(command)
            assert "runs/demo" not in " ".join(command)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.chdir(tmp_path)
    return Runner(Path("out"), Display(Console(quiet=True), log_tail))


def counting_stage(**changes: Any) -> Stage:
    """A stage that adds a line to out/count.txt each time it really runs."""
    code = "open('out/count.txt', 'a').write('run\\n'); print('counted')"
    stage = Stage(
        "count",
        "Count its own runs",
        (("python", "-c", code),),
        inputs=(Path("input.txt"),),
        outputs=(Path("out/count.txt"),),
    )
    return replace(stage, **changes)


def runs() -> int:
    return Path("out/count.txt").read_text().count("run")


def test_a_stage_that_is_done_is_not_done_again(runner: Runner) -> None:
    Path("input.txt").write_text("a")
    runner.run([counting_stage()])
    runner.run([counting_stage()])
    assert runs() == 1
    record = read_record(Path("out"), "count")
    assert record is not None
    assert record.state == "done"
    assert record.seconds > 0
    assert record.peak_memory_bytes > 0
    assert Path(record.log).read_text().endswith("counted\n")


@pytest.mark.parametrize("change", ["input", "command", "environment", "output"])
def test_a_stage_whose_making_has_changed_is_done_again(runner: Runner, change: str) -> None:
    Path("input.txt").write_text("a")
    runner.run([counting_stage()])
    stage = counting_stage()
    if change == "input":
        Path("input.txt").write_text("b")
    elif change == "command":
        stage = counting_stage(commands=(*stage.commands, ("python", "-c", "pass")))
    elif change == "environment":
        stage = counting_stage(environment={"SOME_VARIABLE": "1"})
    else:
        stage = counting_stage(outputs=(*stage.outputs, Path("out/count.txt").with_name("b.txt")))
        stage = replace(
            stage, commands=(*stage.commands, ("python", "-c", "open('out/b.txt', 'w')"))
        )
    runner.run([stage])
    assert runs() == 2


def test_a_stage_follows_a_new_run_of_the_one_before(runner: Runner) -> None:
    Path("input.txt").write_text("a")
    first = Stage("first", "Write", (("python", "-c", "open('out/first.txt', 'w')"),))
    first = replace(first, outputs=(Path("out/first.txt"),))
    second = counting_stage(after=("first",))
    runner.run([first, second])
    runner.run([first, second])
    assert runs() == 1
    Path("out/first.txt").unlink()
    runner.run([first, second])
    assert runs() == 2


def test_a_changed_stage_starts_from_nothing_and_an_interrupted_one_goes_on(runner: Runner) -> None:
    Path("input.txt").write_text("a")
    failing = counting_stage(
        commands=(*counting_stage().commands, ("python", "-c", "raise SystemExit(3)")),
        clears=(Path("out/count.txt"),),
    )
    for _ in range(2):
        with pytest.raises(StageError):
            runner.run([failing])
    assert runs() == 2
    Path("input.txt").write_text("b")
    with pytest.raises(StageError):
        runner.run([failing])
    assert runs() == 1


def test_a_failing_command_shows_the_end_of_its_log(runner: Runner) -> None:
    Path("input.txt").write_text("a")
    code = "print('the reason is here'); raise SystemExit(7)"
    with pytest.raises(StageError) as caught:
        runner.run([counting_stage(commands=(("python", "-c", code),))])
    message = str(caught.value)
    assert "exit code 7" in message
    assert "the reason is here" in message
    assert str(Path("out/logs/count.log")) in message
    record = read_record(Path("out"), "count")
    assert record is not None
    assert record.state == "failed"


def test_what_earlier_attempts_took_counts(runner: Runner) -> None:
    Path("input.txt").write_text("a")
    code = "import os, sys, time\nif os.path.exists('out/tried'): sys.exit()\n"
    code += "held = b'1' * 10**8; open('out/tried', 'w'); time.sleep(1); sys.exit(3)"
    stage = counting_stage(commands=(("python", "-c", code), *counting_stage().commands))
    with pytest.raises(StageError):
        runner.run([stage])
    failed = read_record(Path("out"), "count")
    runner.run([stage])
    done = read_record(Path("out"), "count")
    # Another key begins with nothing.
    Path("input.txt").write_text("b")
    runner.run([stage])
    anew = read_record(Path("out"), "count")
    assert failed is not None
    assert done is not None
    assert anew is not None
    assert 1 <= failed.seconds < done.seconds
    assert anew.seconds < done.seconds
    assert 10**8 < failed.peak_memory_bytes <= done.peak_memory_bytes
    assert anew.peak_memory_bytes < 10**8


def test_an_interrupted_stage_leaves_no_process_behind(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time, os; "
    child += 'open(\\"out/pid\\", \\"w\\").write(str(os.getpid())); time.sleep(600)\'])'
    stage = Stage("sleep", "Sleep", (("python", "-c", child),))

    def interrupt() -> None:
        if Path("out/pid").exists() and Path("out/pid").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(runner._display, "refresh", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run([stage])
    state = Path(f"/proc/{Path('out/pid').read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    record = read_record(Path("out"), "sleep")
    assert record is not None
    assert record.state == "failed"
    assert record.seconds > 0
    assert record.peak_memory_bytes > 0


SLEEPING = Stage("sleep", "Sleep", (("sh", "-c", "echo $$ > out/pid; exec sleep 600"),))
# A command of one stage, as a terminal's foreground process has it.
COMMAND = """
import argparse, sys
from pathlib import Path
from launch.workflow import command
from launch.workflow.stage import Stage
command.ROOT = Path.cwd()
options = argparse.Namespace(until=None, list=False)
sys.exit(command.run_stages(options, Path("out"), lambda _: [{stage!r}], lambda *_: None))
"""


@pytest.fixture
def sleeping(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A command that runs a stage, and the stage's process."""
    code = COMMAND.format(stage=SLEEPING)
    root = str(Path(__file__).resolve().parents[2])
    command = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}
    )
    pid = tmp_path / "out/pid"
    while not (pid.exists() and pid.read_text()):
        assert command.poll() is None
        time.sleep(0.05)
    stage = psutil.Process(int(pid.read_text()))
    yield command, stage
    for process in (command, stage):
        with contextlib.suppress(psutil.Error):
            process.kill()
    command.wait()


def has_ended(process: psutil.Process) -> bool:
    # Nobody may wait for a process whose parent is gone.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_or_loses_its_terminal_ends_its_stage(
    sleeping: tuple[subprocess.Popen[bytes], psutil.Process], number: int
) -> None:
    command, stage = sleeping
    for _ in range(2):
        command.send_signal(number)
    assert command.wait(30) == 128 + number
    assert has_ended(stage)


def test_no_second_command_works_beside_a_stage_even_if_the_first_was_killed(
    runner: Runner, sleeping: tuple[subprocess.Popen[bytes], psutil.Process]
) -> None:
    command, stage = sleeping
    with pytest.raises(UserError, match=r"--output out: another command is at work there"):
        runner.run([SLEEPING])
    command.kill()
    command.wait()
    with pytest.raises(UserError, match=r"or a stage of one that was killed"):
        runner.run([SLEEPING])
    stage.kill()
    while not has_ended(stage):
        time.sleep(0.05)
    runner.run([replace(SLEEPING, commands=(("true",),))])


def test_two_runs_on_one_machine_take_two_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("deepspeed", "--num_accelerators", "2", "launch/pretrain.py")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr(workflow_runner, "_DEEPSPEED_PORT", taken)
        head, flag, port, *rest = with_free_port(command)
        assert (head, flag, rest) == ("deepspeed", "--master_port", list(command[1:]))
        assert int(port) != taken
        assert with_free_port(("python", "a.py")) == ["python", "a.py"]
    assert with_free_port(command) == list(command)


def test_the_command_line_names_an_unknown_stage() -> None:
    command = [sys.executable, "-m", "launch.demo", "--until", "teatime"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "teatime" in done.stderr
    assert "tokenize" in done.stderr


@pytest.mark.parametrize("package", ["launch.demo", "launch.moving_digits"])
def test_an_output_that_is_a_file_is_named(package: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = run_command_line(sys.executable, "-m", package, "--output", str(tmp_path / "file"))
    assert done.returncode == 2
    assert f"--output {tmp_path / 'file'} cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_seed_below_zero_is_refused_before_anything_is_listed() -> None:
    done = run_command_line(sys.executable, "-m", "launch.moving_digits", "--list", "--seed", "-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --seed must be a whole number of at least 0, not -1\n"
