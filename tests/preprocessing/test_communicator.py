"""How ranks find each other, whatever has started them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from farm_clips import clip_command
from farm_runs import contents, run_farm

from preprocessing import communicator
from preprocessing.__main__ import main
from preprocessing.communicator import LAUNCHER_VARIABLES, LoneCommunicator, join_ranks

# What Slurm sets in a job's script, and srun for each task, whichever MPI it speaks.
OF_SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
}
# Takes from a rank what mpirun sets and srun does not, and fails where PMIx has left nothing.
AS_SRUN = """
for name in $(env | sed -n 's/^\\(OMPI_[^=]*\\|PRTE_[^=]*\\|PMI_[^=]*\\)=.*/\\1/p'); do
    unset "$name"
done
export SLURM_PROCID="${PMIX_RANK:?}" SLURM_NTASKS="$1"
shift
exec "$@"
"""


class MpiRanks:
    """In the place of those that would start MPI."""


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(communicator, "MpiCommunicator", MpiRanks)
    for name in (*LAUNCHER_VARIABLES, *OF_SLURM):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [
        # Open MPI's mpirun.
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"},
        # MPICH's and Intel MPI's mpiexec, srun --mpi=pmi2.
        {"PMI_RANK": "1", "PMI_SIZE": "4"},
        {**OF_SLURM, "PMI_RANK": "1", "PMI_SIZE": "4"},
        # srun --mpi=pmix; the first rank's number is 0.
        {**OF_SLURM, "PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.7.0"},
        *({name: "0"} for name in LAUNCHER_VARIABLES),
    ],
)
def test_processes_that_a_launcher_knows_join_one_another(
    unlaunched: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        unlaunched.setenv(name, value)
    assert isinstance(join_ranks(), MpiRanks)


@pytest.mark.parametrize("variables", [{}, OF_SLURM])
def test_a_process_that_no_launcher_knows_is_alone(
    unlaunched: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """On a laptop; in a job's script, in salloc's shell, under srun --mpi=none."""
    for name, value in variables.items():
        unlaunched.setenv(name, value)
    assert isinstance(join_ranks(), LoneCommunicator)


def test_ranks_without_mpi4py_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PMIX_RANK", "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert main(["verify", "nowhere"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "no MPI can be loaded" in told
    assert "pip install 'megatron-nuwa[mpi]'" in told


def test_ranks_without_an_mpi_library_say_what_is_missing(tmp_path: Path) -> None:
    nowhere = {"PMIX_RANK": "0", "MPI4PY_LIBMPI": str(tmp_path / "libmpi.so")}
    done = run_farm(1, ["verify", "nowhere"], **nowhere)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no MPI can be loaded" in done.stderr


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_ranks_that_only_pmix_knows_make_the_same_bytes(
    clip_manifest: Path, tools: Path, tmp_path: Path, undisturbed: dict[str, bytes], ranks: int
) -> None:
    output = tmp_path / "corpus"
    command = clip_command(clip_manifest, output, tools)
    done = run_farm(ranks, command, through=["sh", "-c", AS_SRUN, "srun", str(ranks)])
    assert done.returncode == 0, done.stderr
    assert f"tokenize: {ranks} encoders" in done.stdout
    assert contents(output) == undisturbed
