"""What a stage of a run is, and the surroundings that its commands need."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

PROCESSES = 2


@dataclass(frozen=True)
class Stage:
    """One step of a run: commands that go one after the other, each as its own process.

    A finished stage is repeated when its commands, the bytes of `inputs`, or a new run of a stage
    in `after` differ from those of its record, or when one of `outputs` is missing. Then `clears`
    is removed first, so that nothing of an older attempt is taken up.
    """

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    clears: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def process_environment(accelerators: int) -> dict[str, str]:
    """Variables of a command that starts two processes on a machine with so many GPUs."""
    if accelerators >= PROCESSES:
        return {}
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if accelerators:
        # One GPU cannot serve two processes of an NCCL group.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def mpi_environment() -> dict[str, str]:
    """Variables of a command that starts with mpirun."""
    # Open MPI refuses to start as root, the usual user of a container, without these two.
    if os.geteuid() != 0:
        return {}
    return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def count_accelerators() -> int:
    """Number of NVIDIA GPUs, asked of torch only where a driver is installed."""
    if shutil.which("nvidia-smi") is None:
        return 0
    import torch

    return torch.cuda.device_count()
