"""Farms that are killed at any moment, whoever is hit, and then repeated."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from farm_clips import SHARDS, clip_command
from farm_runs import (
    VICTIMS,
    Moment,
    contents,
    end_of,
    environment,
    family_of,
    is_at_work,
    kill_farm,
    mpirun,
    run_farm,
    start_farm,
    wait_until,
)

from preprocessing.__main__ import main
from preprocessing.ledger import Ledger
from preprocessing.state import FarmFolder

# Several farms one after the other, and a machine may be slow.
pytestmark = pytest.mark.timeout(3000)
TRIES = 5
# Ranks, who is killed, and in how many farms: ten of each number of ranks.
KILLS = [
    *((1, victim, 5) for victim in ("rank", "decoder")),
    *((ranks, victim, 3) for ranks in (2, 3, 4) for victim in ("rank", "ranks")),
    *((ranks, victim, 2) for ranks in (2, 3, 4) for victim in ("decoder", "mpirun")),
]


def kill_once(
    command: list[str], ranks: int, folder: Path, victim: str, choose: random.Random
) -> bool:
    """Start a farm and kill it at a random moment; false where it was done by then."""
    output = Path(command[command.index("--output") + 1])
    roles = ["--decode-ranks-per-encoder", str(choose.choice((0, 1)))] if ranks > 1 else []
    moment = Moment.chosen(output, SHARDS, choose)
    farm = start_farm(ranks, [*command, *roles], folder / "log")
    moment.await_in(farm, output)
    return kill_farm(farm, output, victim, choose)


def test_farm_that_is_killed_four_times_is_completed_to_the_same_bytes(
    clip_manifest: Path, tools: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "corpus"
    command = clip_command(clip_manifest, output, tools)
    hits = 0
    for ranks, shards, victim in (
        (1, 0, "ranks"),
        (3, 1, "rank"),
        (4, 3, "mpirun"),
        (1, 5, "rank"),
    ):
        farm = start_farm(ranks, command, tmp_path / "log")
        Moment(shards, 0).await_in(farm, output)
        hits += kill_farm(farm, output, victim, random.Random(ranks))
    assert hits >= 2
    assert main(command) == 0
    assert contents(output) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "victim", "runs"), KILLS)
def test_forty_farms_killed_at_random_moments_end_in_the_same_bytes(
    clip_manifest: Path,
    tools: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    ranks: int,
    victim: str,
    runs: int,
) -> None:
    for run in range(runs):
        choose = random.Random(f"{ranks} {victim} {run}")
        output = tmp_path / f"corpus{run}"
        command = clip_command(clip_manifest, output, tools)
        misses = 0
        while not kill_once(command, ranks, tmp_path, victim, choose):
            # It was done: another one is killed at another moment.
            misses += 1
            assert misses < TRIES, "every one was done before it could be killed"
            for folder in (output, FarmFolder(output).path):
                shutil.rmtree(folder)
        if victim != "decoder" and choose.random() < 0.5:
            other = choose.choice(VICTIMS if ranks > 1 else VICTIMS[:2])
            kill_once(command, ranks, tmp_path, other, choose)
        done = run_farm(ranks, command)
        assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log").read_text()
        assert contents(output) == undisturbed, (ranks, victim, run)
        print(f"{ranks} ranks, {victim}, farm {run}: hit after {misses} misses")


def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from preprocessing.communicator import join_ranks\n"
        "rank = join_ranks().rank\n"
        "Path(sys.argv[1], f'rank{rank}').touch()\n"
        "time.sleep(600)\n"
    )
    farm = psutil.Popen(
        [*mpirun(2), sys.executable, str(script), str(tmp_path)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("rank*"))) == 2, farm)
        family = family_of(farm)
        assert len(family) == 3
        farm.kill()
        assert end_of(farm, family) == -signal.SIGKILL
    finally:
        for process in family_of(farm):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize(
    "launched",
    [
        # srun --mpi=none, or an srun whose default it is.
        [{"SLURM_PROCID": rank, "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"} for rank in "01"],
        pytest.param(
            # srun --mpi=pmi2 under an MPI that speaks PMIx alone.
            [{"PMI_RANK": rank, "PMI_SIZE": "2"} for rank in "01"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_know_nothing_of_each_other_do_the_work_once(
    clip_manifest: Path,
    tools: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    launched: list[dict[str, str]],
) -> None:
    output = tmp_path / "corpus"
    command = clip_command(clip_manifest, output, tools)
    first = start_farm(1, command, tmp_path / "log", **launched[0])
    try:
        assert Moment(2, 0).await_in(first, output)
        # It stands still, so that all that changes now is the other one's doing.
        first.suspend()
        assert is_at_work(first, output)
        before = everything(tmp_path)
        second = run_farm(1, command, **launched[1])
        assert second.returncode == 2, second.stdout + second.stderr
        assert second.stderr.count("\n") == 1
        assert "error: another farm is at work on this corpus" in second.stderr
        assert everything(tmp_path) == before
        first.resume()
        assert first.wait(120) == 0, (tmp_path / "log").read_text()
    finally:
        if first.poll() is None:
            first.kill()
    assert contents(output) == undisturbed


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files of a folder: when they were changed, and what they hold."""
    return {
        str(path): (path.stat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def test_farm_that_is_killed_at_its_start_counts_no_attempts_of_a_deleted_corpus(
    clip_manifest: Path,
    tools: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "corpus"
    command = clip_command(clip_manifest, output, tools)
    folder = FarmFolder(output)
    folder.attempts.mkdir(parents=True)
    counts = {"journals": [], "rows": {"0": {"failed": 0, "deaths": 99}}}
    (folder.attempts / "attempts.json").write_text(json.dumps(counts))
    begin = Ledger.begin

    def killed(ledger: Ledger) -> None:
        begin(ledger)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "begin", killed)
        with pytest.raises(SystemExit):
            main(command)
    assert os.listdir(output) == ["settings.json"]
    assert main(command) == 0
    assert contents(output) == undisturbed
