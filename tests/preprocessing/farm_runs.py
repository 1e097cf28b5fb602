"""Farms that are started as a user starts them, watched while they work, and killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_MPIRUN = Path(sys.executable).with_name("mpirun")


def environment(**more: str) -> dict[str, str]:
    """What ranks of tests are started with."""
    return {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def mpirun(ranks: int) -> list[str]:
    """What starts so many ranks of what follows it."""
    return [str(_MPIRUN), "-n", str(ranks), "--bind-to", "none", "--oversubscribe"]


def farm_command(ranks: int, arguments: Sequence[str], through: Sequence[str] = ()) -> list[str]:
    """The command of a farm: under mpirun where it has several ranks.

    `through` is a command that starts what follows it, put in front of every rank.
    """
    command = [*through, sys.executable, "-m", "preprocessing", *arguments]
    if ranks == 1:
        return command
    return [*mpirun(ranks), *command]


def run_farm(
    ranks: int, arguments: Sequence[str], through: Sequence[str] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a farm to its end."""
    return subprocess.run(
        farm_command(ranks, arguments, through),
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def start_farm(ranks: int, arguments: Sequence[str], log: Path, **more: str) -> psutil.Popen:
    """Start a farm and leave it to its work."""
    with log.open("ab") as stream:
        return psutil.Popen(
            farm_command(ranks, arguments),
            env=environment(**more),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def ranks_of(farm: psutil.Popen) -> list[psutil.Process]:
    """The farm's own ranks, without mpirun and what they decode with."""
    found = []
    for process in family_of(farm):
        try:
            if process.cmdline()[1:3] == ["-m", "preprocessing"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def family_of(farm: psutil.Popen) -> list[psutil.Process]:
    """All processes of a farm."""
    try:
        return [farm, *farm.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [farm]


def is_at_work(farm: psutil.Popen, output: Path) -> bool:
    """Whether a farm has its corpus to itself, which it has before it writes and until its end."""
    lock = str(output.with_name(f"{output.name}.farm") / "lock")
    for rank in ranks_of(farm):
        try:
            if any(file.path == lock for file in rank.open_files()):
                return True
        except psutil.Error:
            continue
    return False


def shards_of(output: Path) -> int:
    """How many shards a corpus has by now."""
    return len(list(output.glob("shard-*.json")))


@dataclass(frozen=True)
class Moment:
    """A moment of a farm's work: when it has so many shards, and so many seconds later."""

    shards: int
    seconds: float

    @classmethod
    def chosen(cls, output: Path, shards: int, choose: random.Random) -> Moment:
        """One at which the farm is likely still to have something to do."""
        least = min(shards_of(output), shards - 1)
        return cls(choose.randrange(least, shards), choose.uniform(0, 0.3))

    def await_in(self, farm: psutil.Popen, output: Path) -> bool:
        """Wait for it; false where the farm has ended before."""
        came = wait_until(
            lambda: shards_of(output) >= self.shards and is_at_work(farm, output), farm
        )
        time.sleep(self.seconds)
        return came


# Who is killed; the last two where there are several ranks.
VICTIMS = ("rank", "decoder", "ranks", "mpirun")


def kill_farm(farm: psutil.Popen, output: Path, victim: str, choose: random.Random) -> bool:
    """`kill -9` one rank, all of them, something they decode with, or mpirun; await the end of all.

    False where the corpus was finished, or nobody was there any more.
    """
    family = family_of(farm)
    if victim == "decoder":
        hit = _kill_decoder(farm, choose)
        # Its item is tried again.
        assert end_of(farm, family) == 0
        return hit
    ranks = ranks_of(farm)
    chosen = {
        "rank": choose.sample(ranks, min(1, len(ranks))),
        "ranks": ranks,
        "mpirun": _launchers(farm, ranks),
    }
    hit = _kill(chosen[victim])
    code = end_of(farm, family)
    hit = hit and not (output / "corpus.json").exists()
    assert code != 0 or not hit
    return hit


def end_of(farm: psutil.Popen, family: Sequence[psutil.Process], seconds: float = 400) -> int:
    """Wait until nothing of a farm is left, which is up to itself; its exit code."""
    _, left = psutil.wait_procs(family, timeout=seconds)
    told = [process.as_dict(["pid", "status", "cmdline"]) for process in left]
    for process in left:
        process.kill()
    assert not left, f"these have outlived their farm by {seconds} s: {told}"
    return int(farm.wait(seconds))


def _launchers(farm: psutil.Popen, ranks: Sequence[psutil.Process]) -> list[psutil.Process]:
    theirs = {child.pid for rank in ranks for child in [rank, *_children(rank)]}
    return [process for process in family_of(farm) if process.pid not in theirs]


def _kill_decoder(farm: psutil.Popen, choose: random.Random, seconds: float = 60) -> bool:
    """They live for fractions of a second: one that is found may be gone when it is hit."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and farm.poll() is None:
        children = [child for rank in ranks_of(farm) for child in _children(rank)]
        if children and _kill([choose.choice(children)]):
            return True
    return False


def _kill(processes: Sequence[psutil.Process]) -> bool:
    hits = 0
    for process in processes:
        try:
            # What has ended keeps its number until its parent has asked after it.
            hits += process.status() != psutil.STATUS_ZOMBIE
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    return hits > 0


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def wait_until(condition: Callable[[], bool], farm: psutil.Popen, seconds: float = 400) -> bool:
    """Whether a condition became true before the farm ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if farm.poll() is not None:
            return False
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s in vain")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a corpus, byte by byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
