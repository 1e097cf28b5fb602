"""Processes started by mpirun, by srun and by the job files join and add up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, SmallWorld

from megatron_nuwa.errors import UserError
from megatron_nuwa.training import launcher
from megatron_nuwa.training.launcher import adopt_launcher_environment, first_host

JOIN = ROOT / "tests/launch/join_and_sum.py"
BIN = Path(sys.executable).parent
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SUMS = ["rank 0 of 2 local 0 sum 3", "rank 1 of 2 local 1 sum 3"]
# srun as the processes see it: every task has a number, and the step has a list of nodes.
FAKE_SRUN = """#!/usr/bin/env bash
[[ -z ${SRUN_CALLS:-} ]] || echo "$@" >> "$SRUN_CALLS"
while [[ $1 == --* ]]; do shift; done
trap 'kill -USR1 "${tasks[@]}"' USR1
export SLURM_JOB_ID=71 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks[$task]=$!
done
code=0
for task in 0 1; do
    while true; do
        wait "${tasks[$task]}" && ended=0 || ended=$?
        kill -0 "${tasks[$task]}" 2>/dev/null || break
    done
    ((ended == 0)) || code=$ended
done
exit $code
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then
    echo "JobId=71 JobName=nuwa"
    echo "   JobState=${JOB_STATE:-RUNNING Reason=None} Dependency=(null)"
    echo "   PreemptEligibleTime=2026-01-02T03:04:05 PreemptTime=${PREEMPT_TIME:-None}"
else
    echo "$@" >> "$SCONTROL_CALLS"
fi
"""
# Stands for a run of 20 steps: it saves the step STEP when it is told to end, unless CODE says no.
STOPPABLE = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path({folder!r}), os.environ["SLURM_PROCID"]
def end(*_):
    if "STEP" in os.environ:
        step = f"step_{{int(os.environ['STEP']):08d}}"
        (folder / "run/checkpoints" / step).mkdir(parents=True, exist_ok=True)
    sys.exit(int(os.environ["CODE"]) * int(rank))
signal.signal(signal.SIGUSR1, end)
signal.signal(signal.SIGTERM, end)
(folder / f"ready{{rank}}").write_text(str(os.getpid()))
time.sleep(60)
sys.exit(9)
"""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables."""
    for name in list(os.environ):
        if name in NAMES or name.startswith(("OMPI_", "SLURM_", "PMIX_", "PRTE_")):
            # delenv alone would not take away afterwards what the code sets.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def environment(**extra: str) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in NAMES and not name.startswith(("OMPI_", "SLURM_", "PMIX_", "PRTE_"))
    }
    return {
        **inherited,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **extra,
    }


def run(
    *command: str | Path, timeout: float = 180, cwd: Path = ROOT, **extra: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def sums(output: str) -> list[str]:
    return sorted(line[line.index("rank ") :] for line in output.splitlines() if " sum " in line)


def needs_mpirun() -> None:
    if not (BIN / "mpirun").exists():
        pytest.skip("this environment has no mpirun (extra 'mpi')")


@pytest.fixture
def fake_slurm(tmp_path: Path) -> Path:
    """A folder for PATH with an srun that runs two tasks here, and a scontrol that takes notes."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_job_files_are_valid_shell_and_say_what_they_miss(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0
    assert os.access(script, os.X_OK)
    refused = run("bash", script)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")


def test_deepspeed_reads_the_example_files() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    hosts = fetch_hostfile(str(ROOT / "launch/hostfile.example"))
    assert dict(hosts) == {"node-01": 8, "node-02": 8}
    # DeepSpeed splits every line of the environment at its first "=".
    for line in (ROOT / ".deepspeed_env.example").read_text().splitlines():
        name, value = line.split("=", maxsplit=1)
        assert name.isupper(), value


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node-01", "node-01"),
        ("alpha,beta", "alpha"),
        ("gpu[07-12,20],cpu1", "gpu07"),
        ("rack2-gpu[3,5-9]-ib,rack3-gpu1", "rack2-gpu3-ib"),
        ("10.0.0.7,10.0.0.8", "10.0.0.7"),
    ],
)
def test_first_host_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_an_empty_list_of_nodes_is_refused() -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        first_host("")


def slurm_step(patch: pytest.MonkeyPatch, **changes: str) -> None:
    step = {
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }
    for name, value in {**step, **changes}.items():
        patch.setenv(name, value)


def test_a_task_of_srun_learns_its_rank_and_where_to_meet(bare: pytest.MonkeyPatch) -> None:
    slurm_step(bare)
    adopt_launcher_environment()
    assert [os.environ[name] for name in NAMES] == ["9", "16", "1", "gpu07", "16236"]


def test_what_is_set_already_wins(bare: pytest.MonkeyPatch) -> None:
    slurm_step(bare)
    bare.setenv("MASTER_ADDR", "10.1.1.1")
    adopt_launcher_environment()
    assert os.environ["MASTER_ADDR"] == "10.1.1.1"
    bare.setenv("RANK", "3")
    bare.setenv("WORLD_SIZE", "4")
    slurm_step(bare, SLURM_PROCID="5")
    adopt_launcher_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "4")


def test_a_batch_script_of_slurm_is_no_task(bare: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NTASKS", "64"), ("SLURM_JOB_ID", "7")):
        bare.setenv(name, value)
    adopt_launcher_environment()
    assert "RANK" not in os.environ


def test_mpis_variables_are_taken_over(bare: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "4")):
        bare.setenv(f"OMPI_COMM_WORLD_{name}", value)
    asked: list[tuple[int, bool]] = []

    def agree(size: int, one_node: bool) -> tuple[str, str]:
        asked.append((size, one_node))
        return "node-01", "4242"

    bare.setattr(launcher, "_agree_by_mpi", agree)
    adopt_launcher_environment()
    assert [os.environ[name] for name in NAMES] == ["5", "8", "1", "node-01", "4242"]
    assert asked == [(8, False)]


def test_two_processes_of_mpirun_find_each_other_without_an_address() -> None:
    needs_mpirun()
    done = run("mpirun", "-n", "2", "--bind-to", "none", "--oversubscribe", sys.executable, JOIN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sums(done.stdout) == SUMS


def test_a_failed_process_ends_the_others_of_mpirun() -> None:
    needs_mpirun()
    options = ("--bind-to", "none", "--oversubscribe")
    done = run("mpirun", "-n", "2", *options, sys.executable, JOIN, "fail")
    assert done.returncode != 0
    assert sums(done.stdout) == SUMS


def test_the_mpi_job_starts_a_process_a_slot(tmp_path: Path) -> None:
    needs_mpirun()
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# this machine\nlocalhost slots=2\n")
    done = run(
        *("bash", "launch/mpi.sh", hostfile, "RECIPE"),
        MASTER_PORT="29687",
        MPI_ARGS="--oversubscribe",
        SCRIPT=str(JOIN),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sums(done.stdout) == SUMS


SHOWN = ("MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "SPACED", "LAST")


@pytest.fixture
def set_variables(tmp_path: Path) -> tuple[Path, list[str]]:
    """A working folder with a .deepspeed_env, and what a script in it then says of each rank."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "show.py").write_text(
        f"import os\nfor name in {SHOWN}: print(name, os.environ[name])\n"
    )
    values = ("10.1.2.3", "29777", str(ROOT), "one two", "no new line after this")
    pairs = list(zip(SHOWN, values, strict=True))
    (folder / ".deepspeed_env").write_text("\n".join(f"{name}={value}" for name, value in pairs))
    return folder, sorted(f"{name} {value}" for name, value in pairs)


def shown(output: str) -> list[str]:
    return sorted(line for line in output.splitlines() if line.startswith(SHOWN))


def test_the_mpi_job_sets_what_the_environment_file_says(
    set_variables: tuple[Path, list[str]],
) -> None:
    needs_mpirun()
    folder, expected = set_variables
    (folder / "hostfile").write_text("localhost slots=1\n")
    done = run(
        *("bash", "launch/mpi.sh", "hostfile", "RECIPE"),
        cwd=folder,
        PYTHONPATH=f"{ROOT}{os.pathsep}/elsewhere",
        MASTER_ADDR="10.9.9.9",
        SCRIPT="show.py",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert shown(done.stdout) == expected


def test_the_slurm_job_sets_what_the_environment_file_says(
    set_variables: tuple[Path, list[str]], fake_slurm: Path
) -> None:
    folder, expected = set_variables
    done = run(
        *("bash", "launch/slurm.sh", "RECIPE"),
        cwd=folder,
        PATH=f"{fake_slurm}{os.pathsep}{environment()['PATH']}",
        PYTHONPATH=f"{ROOT}{os.pathsep}/elsewhere",
        MASTER_ADDR="10.9.9.9",
        SCRIPT="show.py",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert shown(done.stdout) == sorted(2 * expected)


def test_deepspeeds_openmpi_launcher(tmp_path: Path) -> None:
    needs_mpirun()
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    options = "--bind-to none --oversubscribe --mca btl_tcp_if_include lo"
    done = run(
        *("deepspeed", "--hostfile", hostfile, "--launcher", "openmpi", "--force_multi"),
        *("--no_ssh_check", "--master_addr", "127.0.0.1", "--launcher_args", options, JOIN),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sums(done.stdout) == SUMS


def test_the_slurm_job_runs_the_preflight_on_two_tasks(
    small_world: SmallWorld, fake_slurm: Path
) -> None:
    path = f"{fake_slurm}{os.pathsep}{environment()['PATH']}"
    done = run(
        *("bash", "launch/slurm.sh", small_world.recipe, f"run={small_world.folder / 'slurm'}"),
        PATH=path,
        SCRIPT="launch/preflight.py",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready: pp1_tp1_dp2_zero1_fp32, 2 processes on 1 node" in done.stdout
    assert not (small_world.folder / "slurm").exists()


class StoppableJob:
    """launch/slurm.sh over two tasks that end when they are told to."""

    def __init__(self, world: SmallWorld, slurm: Path, folder: Path, **extra: str) -> None:
        self.folder, self.calls, self.srun_calls = folder, folder / "calls", folder / "srun_calls"
        script = folder / "pretrain.py"
        script.write_text(STOPPABLE.format(folder=str(folder)))
        variables = {
            "PATH": f"{slurm}{os.pathsep}{environment()['PATH']}",
            "SCRIPT": str(script),
            "SCONTROL_CALLS": str(self.calls),
            "SRUN_CALLS": str(self.srun_calls),
            "SLURM_JOB_ID": "71",
            "CODE": "0",
        }
        command = ["bash", "launch/slurm.sh", str(world.recipe), f"run={folder / 'run'}"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**variables | extra),
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in (0, 1):
            wait_for(folder / f"ready{task}")

    def signal_tasks(self, number: int) -> None:
        """What Slurm does to the tasks themselves."""
        for task in (0, 1):
            os.kill(int((self.folder / f"ready{task}").read_text()), number)

    def end(self) -> tuple[int, str]:
        """The job's exit code, and what was asked of scontrol."""
        try:
            self.output, _ = self.process.communicate(timeout=50)
        finally:
            self.process.kill()
        return self.process.returncode, self.calls.read_text() if self.calls.exists() else ""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_near_the_time_limit_the_slurm_job_saves_and_is_queued_again(
    small_world: SmallWorld, fake_slurm: Path, tmp_path: Path, number: int
) -> None:
    job = StoppableJob(small_world, fake_slurm, tmp_path, STEP="7", SLURM_CPUS_PER_TASK="8")
    job.process.send_signal(number)
    assert job.end() == (0, "requeue 71\n")
    assert "it saves and ends" in job.output
    # Which some versions of srun do not take over from the job.
    assert "--cpus-per-task=8 " in job.srun_calls.read_text()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"JOB_STATE": "COMPLETING Reason=None", "PREEMPT_TIME": "2026-01-03T03:04:05"},
        {"JOB_STATE": "COMPLETING Reason=TimeLimit"},
    ],
    ids=["preempted", "preempted, grace time over", "time limit over"],
)
def test_a_job_that_slurm_itself_ends_is_queued_again(
    small_world: SmallWorld, fake_slurm: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    """Slurm tells the tasks to end, and nobody else."""
    job = StoppableJob(small_world, fake_slurm, tmp_path, STEP="7", **variables)
    job.signal_tasks(signal.SIGTERM)
    assert job.end() == (0, "requeue 71\n")


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({"STEP": "20"}, 0),
        ({"STEP": "7", "JOB_STATE": "COMPLETING Reason=None"}, 0),
        ({"CODE": "3"}, 3),
    ],
    ids=["last step", "cancelled", "failed to save"],
)
def test_a_slurm_job_that_is_over_is_not_queued_again(
    small_world: SmallWorld,
    fake_slurm: Path,
    tmp_path: Path,
    variables: dict[str, str],
    code: int,
) -> None:
    job = StoppableJob(small_world, fake_slurm, tmp_path, **variables)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == (code, "")


def test_a_slurm_job_that_makes_no_step_is_not_queued_for_ever(
    small_world: SmallWorld, fake_slurm: Path, tmp_path: Path
) -> None:
    (tmp_path / "run/faults").mkdir(parents=True)
    note = tmp_path / "run/faults/stops.json"
    note.write_text('{"checkpoint": null, "stops": 5}')
    job = StoppableJob(small_world, fake_slurm, tmp_path)
    job.signal_tasks(signal.SIGTERM)
    assert job.end() == (1, "")


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)
