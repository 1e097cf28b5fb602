"""launch/supervise.py: starts again while that helps, says why it does not, hands signals on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, SmallWorld, run_command_line

from megatron_nuwa.errors import UserError
from megatron_nuwa.training import supervision
from megatron_nuwa.training.supervision import Supervisor, environment, run_of

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
    supervisor = Supervisor(command, restarts=restarts, pause_seconds=0)
    handler = signal.getsignal(signal.SIGTERM)
    assert supervisor.supervise() == code
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(list(tmp_path.glob("start_*"))) == starts
    errors = capfd.readouterr().err
    if reason is None:
        assert "not started again" not in errors
    else:
        assert reason in errors.splitlines()[-1]
        assert f"the run in {tmp_path / 'run'} ended with code {code}: " in errors


def test_a_stop_signal_reaches_the_run_which_is_not_started_again(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    """The launcher between them would die of it."""
    script, launcher = tmp_path / "pretrain.py", tmp_path / "launcher.py"
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
            *(small_world.recipe, f"run={tmp_path / 'run'}"),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
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
            Supervisor(words, restarts=1, pause_seconds=0).supervise()


def test_the_run_is_found_in_the_command(small_world: SmallWorld) -> None:
    start = ["deepspeed", "--hostfile", "h", "launch/pretrain.py"]
    layout = ["--deepspeed_config", "ds_configs/zero1_bf16.json"]
    recipe = str(small_world.recipe)
    assert run_of([*start, recipe]) == small_world.folder / "run"
    assert run_of([*start, *layout, recipe, "run=runs/other"]) == Path("runs/other")
    assert run_of([*start, recipe, "run=runs/other", *layout]) == Path("runs/other")
    assert run_of(["deepspeed", "launch/preflight.py", recipe]) is None
    with pytest.raises(UserError, match="unknown key"):
        run_of([*start, recipe, "nothing=1"])


def test_a_restart_leaves_out_nodes_that_do_not_answer(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher is a program of that name which fails, with what it was given written down."""
    (tmp_path / "hosts").write_text("# all\nn1 slots=2\nn2 slots=2\nn3 slots=2\n")
    launcher = tmp_path / "deepspeed"
    launcher.write_text(
        f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/given\ncat "$2" >> {tmp_path}/hosts_given\n'
        "exit 1\n"
    )
    launcher.chmod(0o755)
    monkeypatch.setattr(supervision, "_answers", lambda host: host != "n1")
    words = [str(launcher), "--hostfile", str(tmp_path / "hosts"), "--master_addr", "n1"]
    words += ["launch/pretrain.py", str(small_world.recipe), f"run={tmp_path / 'run'}"]
    assert Supervisor(words, restarts=5, pause_seconds=0).supervise() == 1
    first, second = (tmp_path / "given").read_text().splitlines()
    assert "--master_addr n1" in first
    assert "--master_addr n2" in second
    hosts = (tmp_path / "hosts_given").read_text().splitlines()
    assert hosts[4:] == ["n2 slots=2", "n3 slots=2"]


def test_ssh_notices_a_silent_node() -> None:
    name = "PDSH_SSH_ARGS_APPEND"
    assert environment({})[name].startswith("-o ServerAliveInterval=")
    assert environment({name: "-F x"})[name].startswith("-F x -o ServerAliveInterval=")
    assert environment({name: "-o ServerAliveInterval=1"})[name] == "-o ServerAliveInterval=1"
    assert environment(os.environ)["PATH"] == os.environ["PATH"]
