"""launch/pretrain.py with a process 1 that is disturbed as DISTURB says.

raise, sleep: in step 3; signal: it is told to stop in step 1; groups: every process prints the
time-outs of all groups instead of training.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist

from launch.pretrain import main
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.pretrain import Pretraining

train_step = Pretraining._train_step
DISTURB = os.environ["DISTURB"]


def disturbed(training: Pretraining, batches: Any) -> None:
    """One step does not end well."""
    if training.processes.rank == 1 and training.step == (0 if DISTURB == "signal" else 2):
        if DISTURB == "raise":
            raise ValueError("disturbed")
        if DISTURB == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            time.sleep(600)
    train_step(training, batches)


def show_groups(_training: Pretraining, _show_samples: Any) -> None:
    """How many seconds which groups wait, and what NCCL's would."""
    from torch.distributed import distributed_c10d as c10d

    groups = [group for group in c10d._world.pg_map if group is not None]
    waits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    waits.append(c10d._get_default_timeout(dist.Backend("nccl")))
    seconds = {wait.total_seconds() for wait in waits}
    monitor = os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]
    print(f"{len(groups)} groups, seconds {seconds}, monitor {monitor}", flush=True)


if __name__ == "__main__":
    Pretraining._train_step = disturbed  # type: ignore[method-assign]
    if DISTURB == "groups":
        Pretraining.run = show_groups  # type: ignore[method-assign]
    run_process(main)
