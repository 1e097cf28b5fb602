"""Two processes that sleep in a roll call; one of them ends as DISTURB says."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nuwa.training import roll_call
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.roll_call import RollCall
from megatron_nuwa.training.watchdog import Watchdog

roll_call._TURN_SECONDS, roll_call._GRACE_SECONDS = 0.1, 0.5
if os.environ["DISTURB"] in ("kill 1", "stop 0", "leave"):
    # Nothing but the silence tells; and who has left in order is not taken for silent.
    roll_call._SILENCE_SECONDS = 3.0
# A busy machine may hold up the one who is to read.
roll_call._FAREWELL_TURNS = 100
# Without a process group, which takes seconds, nobody tells the others.
Processes.first_tells = lambda _self, _work: "same"  # type: ignore[method-assign]


def main() -> None:
    """Sleep, which no backend notices."""
    rank, disturb = int(os.environ["RANK"]), os.environ["DISTURB"]
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, rank == 0)
    processes = Processes(rank, 2, rank, torch.device("cpu"))
    with (
        RollCall(processes) as call,
        Watchdog(1000.0, Path(sys.argv[1]), processes, lambda: 7, call),
    ):
        while call._answered < 3:
            time.sleep(0.05)
        print("begun", flush=True)
        if rank == 1 and disturb == "leave":
            return
        if disturb == f"fail {rank}":
            raise ValueError("disturbed")
        time.sleep(5 if disturb == "leave" else 120)
    del store


if __name__ == "__main__":
    run_process(main)
