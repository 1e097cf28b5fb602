"""Two processes that sleep in a roll call; process 1 ends as DISTURB says."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megatron_nuwa.training import roll_call
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.roll_call import RollCall
from megatron_nuwa.training.watchdog import Watchdog

roll_call._TURN_SECONDS, roll_call._SILENCE_SECONDS, roll_call._GRACE_SECONDS = 0.1, 3.0, 0.5


def main() -> None:
    """Sleep, which no backend notices."""
    with (
        join_processes() as processes,
        RollCall(processes) as call,
        Watchdog(1000.0, Path(sys.argv[1]), processes, lambda: 7, call),
    ):
        print("begun", flush=True)
        if processes.rank == 1:
            if os.environ["DISTURB"] == "leave":
                return
            if os.environ["DISTURB"] == "fail":
                raise ValueError("disturbed")
        time.sleep(5 if os.environ["DISTURB"] == "leave" else 120)


if __name__ == "__main__":
    run_process(main)
