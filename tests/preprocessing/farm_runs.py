"""Farms under MPI whose ranks can be found and killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

MPIRUN = Path(sys.executable).with_name("mpirun")


def environment(**more: str) -> dict[str, str]:
    """What ranks of tests are started with."""
    return {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def farm_command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command of a farm: under mpirun where it has several ranks."""
    command = [sys.executable, "-m", "preprocessing", *arguments]
    if ranks == 1:
        return command
    return [str(MPIRUN), "-n", str(ranks), "--bind-to", "none", "--oversubscribe", *command]


def run_farm(ranks: int, arguments: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run a farm to its end."""
    return subprocess.run(
        farm_command(ranks, arguments),
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=180,
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
    """The farm's own ranks, without mpirun and ffmpeg."""
    found = []
    for process in [farm, *farm.children(recursive=True)]:
        try:
            if process.cmdline()[1:3] == ["-m", "preprocessing"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_farm(farm: psutil.Popen, everybody: bool, choose: random.Random) -> bool:
    """`kill -9` one rank or all of them, and wait until none is left; false where it had ended."""
    family = [farm, *farm.children(recursive=True)]
    ranks = ranks_of(farm)
    for rank in ranks if everybody else choose.sample(ranks, min(1, len(ranks))):
        try:
            rank.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=60)
    # A rank's own death ends ffmpeg only when its pipe breaks; a rerun begins after everything.
    for process in family:
        if process.is_running() and process.pid != farm.pid:
            process.kill()
    return farm.wait(60) != 0


def wait_until(condition: Callable[[], bool], farm: psutil.Popen, seconds: float = 60) -> bool:
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
