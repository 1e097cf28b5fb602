"""launch/supervise.py: starts again while that helps, says why it does not, hands signals on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, SmallWorld, run_command_line
from vqgan_runs import write_recipe

from megatron_nuwa.errors import UserError
from megatron_nuwa.training import supervision
from megatron_nuwa.training.stopping import StopSignals
from megatron_nuwa.training.supervised import run_of
from megatron_nuwa.training.supervision import Supervisor, environment

# Stands for a run: the codes of its starts, and a checkpoint before each that has a "+".
FAKE = """
import os, pathlib, sys, time
folder = pathlib.Path({folder!r})
starts = sorted(folder.glob("start_*"))
(folder / f"start_{{len(starts)}}").touch()
plan = {plan!r}[len(starts)]
if "+" in plan:
    (folder / "run/checkpoints" / f"step_{{len(starts):08d}}").mkdir(parents=True)
sys.exit(int(plan.strip("+")))
"""


@pytest.mark.parametrize(
    ("plan", "restarts", "starts", "code", "reason"),
    [
        (["0"], 10, 1, 0, None),
        (["+1", "+1", "0"], 10, 3, 0, None),
        (["1", "+1", "0"], 10, 3, 0, None),
        (["+1", "1", "0"], 10, 2, 1, "this start added no checkpoint, so it is not started again"),
        (
            ["+1", "+7", "+0"],
            1,
            2,
            7,
            "started again 1 times, which is the limit",
        ),
        (["2", "0"], 10, 1, 2, "that has to be mended first, so it is not started again"),
    ],
)
def test_a_run_is_started_again_while_that_helps(
    small_world: SmallWorld,
    tmp_path: Path,
    plan: list[str],
    restarts: int,
    starts: int,
    code: int,
    reason: str | None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    script = tmp_path / "pretrain.py"
    script.write_text(FAKE.format(folder=str(tmp_path), plan=plan))
    command = [sys.executable, str(script), str(small_world.recipe), f"run={tmp_path / 'run'}"]
    supervisor = Supervisor(command, StopSignals(), restarts=restarts, pause_seconds=0)
    assert supervisor.supervise() == code
    assert len(list(tmp_path.glob("start_*"))) == starts
    errors = capfd.readouterr().err
    if reason is None:
        assert "not started again" not in errors
    else:
        assert reason in errors.splitlines()[-1]
        assert f"the run in {tmp_path / 'run'} ended with code {code}: " in errors


@pytest.mark.parametrize("name", ["pretrain.py", "train_vqgan.py"])
def test_a_stop_signal_reaches_the_run_which_is_not_started_again(
    name: str, small_world: SmallWorld, tmp_path: Path
) -> None:
    """The launcher between them would die of it."""
    script, launcher = tmp_path / name, tmp_path / "launcher.py"
    run = [small_world.recipe, f"run={tmp_path / 'run'}"]
    if name == "train_vqgan.py":
        run = [write_recipe(tmp_path, tmp_path)]
    script.write_text(
        "import signal, sys, pathlib, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    launcher.write_text(
        "import subprocess, sys\n"
        f"sys.exit(subprocess.call([sys.executable, '-u', {str(script)!r}, *sys.argv[2:]]))\n"
    )
    process = subprocess.Popen(
        [
            *(sys.executable, "launch/supervise.py", sys.executable, launcher, script),
            *run,
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=50)
    finally:
        process.kill()
    assert process.returncode == 5
    assert errors.splitlines()[-1] == "it was asked to stop and is not started again"


def test_what_cannot_be_started_is_one_sentence(small_world: SmallWorld, tmp_path: Path) -> None:
    done = run_command_line(sys.executable, "launch/supervise.py")
    assert (done.returncode, done.stderr[:32]) == (2, "error: no command to supervise; ")
    done = run_command_line(sys.executable, "launch/supervise.py", "--restarts", "-1", "true")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --restarts must be a whole number of at least 0, not -1\n",
    )
    run = [str(small_world.recipe), f"run={tmp_path / 'run'}"]
    for words, message in (
        (["no-such-launcher", "launch/pretrain.py", *run], "no-such-launcher cannot be started"),
        (["deepspeed", "launch/pretrain.py"], "pretrain.py is given no recipe"),
        (["deepspeed", "launch/pretrain.py", "nothing.yaml"], "recipe nothing.yaml"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            Supervisor(words, StopSignals(), restarts=1, pause_seconds=0).supervise()


def test_the_run_is_found_in_the_command(small_world: SmallWorld, tmp_path: Path) -> None:
    def folder(command: list[str]) -> Path | None:
        found = run_of(command)
        return None if found is None else found.folder

    start = ["deepspeed", "--hostfile", "h", "launch/pretrain.py"]
    layout = ["--deepspeed_config", "ds_configs/zero1_bf16.json"]
    recipe = str(small_world.recipe)
    assert folder([*start, recipe]) == small_world.folder / "run"
    assert folder([*start, *layout, recipe, "run=runs/other"]) == Path("runs/other")
    assert folder([*start, recipe, "run=runs/other", *layout]) == Path("runs/other")
    assert folder(["deepspeed", "launch/preflight.py", recipe]) is None
    with pytest.raises(UserError, match="unknown key"):
        folder([*start, recipe, "nothing=1"])

    start = ["deepspeed", "--hostfile", "h", "launch/train_vqgan.py"]
    recipe = str(write_recipe(tmp_path, tmp_path))
    assert folder([*start, recipe]) == tmp_path / "run"
    two = [*start, recipe, "sketch_vqgan={run: other, steps: 7, batch_size: 6, data: {train: [x]}}"]
    assert folder(two) == tmp_path / "run"
    assert folder([*two, "--section", "sketch_vqgan"]) == Path("other")
    found = run_of([*two[:4], "--section=sketch_vqgan", *two[4:], "sketch_vqgan.steps=8"])
    assert found is not None
    assert (found.folder, found.last_step) == (Path("other"), 8)
    assert [found.why_not(count) is None for count in (2, 3, 4, 6)] == [True, True, False, True]
    assert folder([*start, recipe, "--section", "sketch_vqgan"]) is None


SLOW_TO_CATCH = """
import pathlib, signal, sys, time
pathlib.Path({begun!r}).touch()
time.sleep(2)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
time.sleep(60)
"""


def supervise(world: SmallWorld, script: Path, *options: str) -> subprocess.Popen[str]:
    """launch/supervise.py around a script that stands for a run, by now with its handlers."""
    command = [sys.executable, "launch/supervise.py", *options, sys.executable, str(script)]
    command += [str(world.recipe), f"run={script.parent / 'run'}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while not supervision.takes(psutil.Process(process.pid), signal.SIGUSR1):
        assert time.monotonic() < end
        time.sleep(0.005)
    return process


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("is_late", [False, True], ids=["nothing started", "run not ready"])
def test_a_stop_signal_at_the_beginning_ends_in_order(
    small_world: SmallWorld, tmp_path: Path, is_late: bool
) -> None:
    """A run that has no handler yet would die of it."""
    script, begun = tmp_path / "pretrain.py", tmp_path / "begun"
    script.write_text(SLOW_TO_CATCH.format(begun=str(begun)))
    process = supervise(small_world, script)
    try:
        if is_late:
            wait_for(begun)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=50)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert errors == ("" if is_late else "asked to stop before start 1, which is left out\n")
    assert begun.exists() == is_late


def test_srun_is_told_to_end_its_tasks_by_the_signal_that_it_hands_on(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    """Of SIGTERM it would kill them; they are no children of it."""
    srun, begun = tmp_path / "srun", tmp_path / "begun"
    srun.write_text(
        "#!/usr/bin/env bash\ntrap 'exit 0' USR1\ntrap 'exit 9' TERM\n"
        f"touch {begun}\nwhile true; do sleep 0.1; done\n"
    )
    srun.chmod(0o755)
    command = [str(srun), sys.executable, "launch/pretrain.py", str(small_world.recipe)]
    process = subprocess.Popen(
        [sys.executable, "launch/supervise.py", *command, f"run={tmp_path / 'run'}"], cwd=ROOT
    )
    try:
        wait_for(begun)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_a_stop_signal_between_two_starts_ends_in_order(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    script = tmp_path / "pretrain.py"
    script.write_text(FAKE.format(folder=str(tmp_path), plan=["1", "0"]))
    process = supervise(small_world, script, "--pause", "50", "--unfinished", "75")
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline(), process.stderr.readline()]
        assert lines[1] == "start 2 of at most 11, in 50 s\n"
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert errors == "asked to stop before start 2, which is left out\n"
    assert process.returncode == 75
    assert len(list(tmp_path.glob("start_*"))) == 1


def test_a_run_before_its_last_step_is_told_by_the_exit_code(
    small_world: SmallWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """But not for ever, where stops come without a new checkpoint."""
    script = tmp_path / "pretrain.py"
    script.write_text(FAKE.format(folder=str(tmp_path), plan=["0", "0", "+0", *"000000", "+0"]))

    def code(*overrides: str) -> int:
        run = [str(small_world.recipe), f"run={tmp_path / 'run'}", *overrides]
        command = [sys.executable, str(script), *run]
        return Supervisor(
            command, StopSignals(), restarts=0, pause_seconds=0, unfinished=75
        ).supervise()

    assert [code() for _ in range(2)] == [75, 75]
    # The third adds the checkpoint of step 2, of 20.
    assert [code() for _ in range(6)] == [75, 75, 75, 75, 75, 1]
    assert "was stopped 6 times without a new checkpoint" in capfd.readouterr().err
    assert code("training.stop_at_step=2") == 0
    # That of step 9.
    assert code("schedule.steps=9") == 0


def test_a_vqgan_s_run_is_started_again_and_told_unfinished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of `steps: 32`, the fourth start reaches the last."""
    script = tmp_path / "train_vqgan.py"
    script.write_text(FAKE.format(folder=str(tmp_path), plan=["+1", "0", "0", "0"]))
    recipe = str(write_recipe(tmp_path, tmp_path))

    def code() -> int:
        command = [sys.executable, str(script), recipe, "--section", "vqgan"]
        return Supervisor(
            command, StopSignals(), restarts=1, pause_seconds=0, unfinished=75
        ).supervise()

    assert code() == 75
    assert f"the run in {tmp_path / 'run'} ended with code 1: " in capfd.readouterr().err
    assert len(list(tmp_path.glob("start_*"))) == 2
    assert code() == 75
    (tmp_path / "run/checkpoints/step_00000032").mkdir()
    assert code() == 0


def test_ssh_notices_a_silent_node() -> None:
    name = "PDSH_SSH_ARGS_APPEND"
    assert environment({})[name].startswith("-o ServerAliveInterval=")
    assert environment({name: "-F x"})[name].startswith("-F x -o ServerAliveInterval=")
    assert environment({name: "-o ServerAliveInterval=1"})[name] == "-o ServerAliveInterval=1"
    assert environment(os.environ)["PATH"] == os.environ["PATH"]
