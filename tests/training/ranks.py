"""The processes of a run as a launcher starts them, at hand to be disturbed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers import ROOT

SCRIPT = ROOT / "launch/pretrain.py"


class Ranks:
    """The processes of one start; leaving the `with` block kills those that are left."""

    def __init__(
        self, count: int, folder: Path, *arguments: str | Path, script: Path = SCRIPT, **extra: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [folder / f"rank_{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                **extra,
            }
            with log.open("w") as stream:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-u", str(script), *map(str, arguments)],
                        cwd=ROOT,
                        env=environment,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes, once all have ended; fails where one does not."""
        end = time.monotonic() + seconds
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def output(self) -> str:
        """What all of them have printed."""
        return "".join(log.read_text() for log in self.logs)

    def wait_for(self, happened: Callable[[], object], seconds: float = 120) -> bool:
        """Wait for something; False where the processes end before."""
        end = time.monotonic() + seconds
        while not happened():
            if all(process.poll() is not None for process in self.processes):
                return bool(happened())
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)
        return True

    def wait_for_step(self, step: int) -> bool:
        """Wait until this step was logged, or a later one."""

        def reached() -> bool:
            steps = re.findall(r"^step (\d+)/", self.logs[0].read_text(), re.MULTILINE)
            return bool(steps) and int(steps[-1]) >= step

        return self.wait_for(reached)
