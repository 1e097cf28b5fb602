"""A failed or hung process ends its run soon, and its error is the one that is seen."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import ROOT, SmallWorld, deepspeed_command, run_command_line
from ranks import SCRIPT, Ranks

from megatron_nuwa.training import watchdog
from megatron_nuwa.training.faults import cause, clear_faults, read_faults
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.supervision import takes
from megatron_nuwa.training.watchdog import Watchdog

DISTURBED = ROOT / "tests/training/disturbed/pretrain.py"
ROLL_CALL = ROOT / "tests/training/disturbed/roll_call.py"


def arguments(world: SmallWorld, run: Path, *more: str) -> list[str | Path]:
    return [world.recipe, f"run={run}", "evaluation=null", *more]


def test_the_error_of_the_failed_process_is_shown_once_and_named_last(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through launch/supervise.py and the deepspeed launcher."""
    monkeypatch.setenv("DISTURB", "raise")
    command = deepspeed_command(2, DISTURBED, *arguments(small_world, tmp_path / "run"))
    done = run_command_line(
        sys.executable, "launch/supervise.py", "--restarts", "0", *command, timeout=240
    )
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert output.count("Traceback (most recent call last)") == 1
    assert done.stdout.count("ends after step 2: another one is gone") == 1
    *_, last, reason = done.stderr.splitlines()
    assert last.endswith("after step 2: ValueError: disturbed")
    assert "process 1 on" in last
    assert "which is the limit (--restarts)" in reason
    kinds = {fault.rank: fault.kind for fault in read_faults(tmp_path / "run")}
    assert kinds == {0: "lost", 1: "error"}


@pytest.mark.slow
def test_a_hung_process_ends_the_run_and_is_named(small_world: SmallWorld, tmp_path: Path) -> None:
    hang = arguments(small_world, tmp_path / "run", "training.hang_seconds=15")
    with Ranks(2, tmp_path, *hang, script=DISTURBED, DISTURB="sleep") as ranks:
        assert ranks.wait(180) == [1, 1]
        assert "did not go on for 15 s (training.hang_seconds)" in ranks.output()
        # Where it hung.
        assert "time.sleep(600)" in ranks.logs[1].read_text()
    [worst, *others] = read_faults(tmp_path / "run")
    assert (worst.rank, worst.step) == (1, 2)
    assert worst.kind == "hang" or not others


@pytest.mark.slow
def test_a_stopped_process_ends_the_others(small_world: SmallWorld, tmp_path: Path) -> None:
    """It cannot say anything itself, as a node that lost its network cannot."""
    run = tmp_path / "run"
    hang = arguments(small_world, run, "training.hang_seconds=15", "schedule.steps=100000")
    with Ranks(2, tmp_path, *hang) as ranks:
        assert ranks.wait_for_step(2)
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        assert ranks.processes[0].wait(120) == 1
        assert "waited for other processes for 15 s" in ranks.logs[0].read_text()
    assert "a process was killed, or its node or network failed" in cause(read_faults(run))


def test_a_signal_to_one_process_saves_and_ends_all_with_0(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    endless = arguments(small_world, tmp_path / "run", "schedule.steps=100000")
    with Ranks(2, tmp_path, *endless) as ranks:
        assert ranks.wait_for_step(2)
        ranks.processes[1].send_signal(signal.SIGUSR1)
        assert ranks.wait(30) == [0, 0], ranks.output()
        assert "SIGUSR1 received: saving step" in ranks.logs[0].read_text()
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1


@pytest.mark.parametrize(
    ("disturb", "told"),
    [
        ("kill 1", "process 1 no longer answers"),
        ("kill 0", "process 0, which holds the store where all met, no longer answers"),
        ("stop 0", "process 0, which holds the store where all met, no longer answers"),
        ("fail 0", "process 0 has failed"),
        ("fail 1", "process 1 has failed"),
        ("leave", None),
    ],
)
def test_a_process_that_is_gone_ends_the_others_though_no_backend_says_so(
    tmp_path: Path, disturb: str, told: str | None
) -> None:
    """As under NCCL, whose collectives wait for the dead; gloo's end with an error."""
    with Ranks(2, tmp_path, tmp_path / "run", script=ROLL_CALL, DISTURB=disturb) as ranks:
        for log in ranks.logs:
            assert ranks.wait_for(lambda log=log: "begun" in log.read_text(), 60)  # type: ignore[misc]
        time.sleep(0.5)
        gone = 0 if disturb.endswith("0") else 1
        if disturb.startswith("kill"):
            ranks.processes[gone].kill()
        elif disturb.startswith("stop"):
            ranks.processes[gone].send_signal(signal.SIGSTOP)
        left = ranks.processes[1 - gone]
        assert left.wait(60) == (0 if told is None else 1)
    found = {fault.rank: fault for fault in read_faults(tmp_path / "run")}
    if told is None:
        assert not found
    else:
        assert found[1 - gone].sentence == told
        assert found[1 - gone].kind == "lost"


@pytest.mark.parametrize("moment", ["importing", "first step"])
def test_a_signal_before_the_first_step_ends_all_with_0_and_saves_nothing(
    small_world: SmallWorld, tmp_path: Path, moment: str
) -> None:
    disturb = "signal" if moment == "first step" else "none"
    endless = arguments(small_world, tmp_path / "run", "schedule.steps=100000")
    script = DISTURBED if disturb == "signal" else SCRIPT
    with Ranks(2, tmp_path, *endless, script=script, DISTURB=disturb) as ranks:
        if moment == "importing":
            process = psutil.Process(ranks.processes[1].pid)
            assert ranks.wait_for(lambda: takes(process, signal.SIGUSR1), 30)
            process.send_signal(signal.SIGUSR1)
        assert ranks.wait(120) == [0, 0], ranks.output()
        said = "SIGUSR1 received before this start's first step: nothing to save, ending"
        assert ranks.output().count(said) == 1
        assert "Traceback" not in ranks.output()
    assert not list(tmp_path.glob("run/checkpoints/*"))


def ended_by(dog: Watchdog, ended: list[int], seconds: float = 30) -> bool:
    """Whether it ends its process in time, which goes on all the same here."""
    with dog:
        dog.steps_begin()
        end = time.monotonic() + seconds
        while not ended and time.monotonic() < end:
            time.sleep(0.02)
    return bool(ended)


def test_who_waits_for_its_gpu_is_not_taken_for_the_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's collectives return at once; the GPU then waits for the others."""
    process = Processes(3, 4, 3, torch.device("cuda", 3))
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(watchdog, "_gpu_is_busy", lambda device: device.index == 3)
    assert ended_by(Watchdog(0.3, tmp_path, process, lambda: 7), ended)
    [fault] = read_faults(tmp_path)
    assert fault.kind == "lost"


def test_a_disk_that_hangs_does_not_keep_a_hung_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(watchdog, "_REPORT_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "write_fault", lambda *_: time.sleep(60))
    process = Processes(0, 1, 0, torch.device("cpu"))
    assert ended_by(Watchdog(0.3, tmp_path, process, lambda: 7), ended, 20)


def test_the_start_has_time_however_short_a_step_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    process = Processes(0, 1, 0, torch.device("cpu"))
    with Watchdog(0.1, tmp_path, process, lambda: 0):
        time.sleep(0.5)
    assert not ended
    for seconds in (0.1, 1800, 86_400):
        longest = max(seconds, watchdog.START_SECONDS)
        assert watchdog.backend_timeout(seconds).total_seconds() > longest + 600


def test_a_job_that_was_suspended_has_not_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clocks went on; its watchdog did not."""
    process = Processes(0, 1, 0, device=None)  # type: ignore[arg-type]
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Watchdog(0.5, tmp_path, process, lambda: 7) as dog:
        dog.steps_begin()
        late = time.monotonic() + 1e6
        monkeypatch.setattr(time, "monotonic", lambda: late)
        assert not ended
        monkeypatch.undo()
        monkeypatch.setattr(os, "_exit", ended.append)
        end = time.monotonic() + 30
        while not ended and time.monotonic() < end:
            time.sleep(0.05)
    assert ended[0] == 1
    [fault] = read_faults(tmp_path)
    assert (fault.kind, fault.step) == ("hang", 7)
    clear_faults(tmp_path)
    assert "no process said why" in cause(read_faults(tmp_path))
