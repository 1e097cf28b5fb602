"""Join the launcher's processes and add up their ranks; `fail` as argument ends rank 1 with 3."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from megatron_nuwa.training.processes import join_processes

with join_processes() as processes:
    total = torch.tensor([processes.rank + 1.0], device=processes.device)
    dist.all_reduce(total)
    line = f"rank {processes.rank} of {processes.world_size} local {processes.local_rank}"
    sys.stdout.write(f"{line} sum {total.item():.0f}\n")
    sys.stdout.flush()
    if "fail" in sys.argv and processes.rank == 1:
        sys.exit(3)
    if "fail" in sys.argv:
        dist.barrier()
