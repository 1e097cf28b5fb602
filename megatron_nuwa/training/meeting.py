"""How the processes of a run find one another, and see that they all have the same device."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.parallel.accelerator import check_accelerator, on_gpu

# The first process holds the store: it leaves last.
_FAREWELL = timedelta(seconds=30)


def meet(patience: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT through which the processes speak.

    Raises `UserError` where the port is taken or not all come within `patience`.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"{place} (MASTER_ADDR:MASTER_PORT) is in use by another program: pass another "
                "port with deepspeed --master_port, or set MASTER_PORT"
            ) from error
        raise UserError(_not_met(place, patience)) from error
    return store


def choose_device(local_rank: int) -> torch.device:
    """This process's device: a GPU of its own, else the CPU.

    Raises `UserError` where it has no GPU although one is meant (`check_accelerator`).
    """
    check_accelerator()
    if not on_gpu():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of {socket.gethostname()} sees only {count} GPUs: start as many "
            "processes a node as it has GPUs, and let each see them all (Slurm: --gpus-per-node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def choose_device_together(
    store: dist.Store, rank: int, world_size: int, local_rank: int, patience: timedelta
) -> torch.device:
    """This process's device, after all have told each other theirs through the store.

    A process with another backend would never meet the others. Raises `UserError` on every
    process, told once, where one has no device or they differ.
    """
    device, failure = None, None
    try:
        device = choose_device(local_rank)
    except UserError as error:
        failure = str(error)
    mine = {
        "place": f"{socket.gethostname()}, process {rank}",
        "device": device.type if device else None,
        "failure": failure,
    }
    store.set(f"device/{rank}", json.dumps(mine))
    store.set_timeout(patience)
    try:
        told = store.multi_get([f"device/{other}" for other in range(world_size)])
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(_not_met(place, patience)) from error
    problem = _problem([json.loads(text) for text in told])
    if problem is None:
        assert device is not None
        return device
    with suppress(dist.DistError):
        if store.add("device/read", 1) == world_size:
            store.set("device/all_read", "")
        if rank == 0:
            store.wait(["device/all_read"], _FAREWELL)
    raise (UserError if rank == 0 else ReportedElsewhereError)(problem)


def _problem(processes: list[dict[str, str | None]]) -> str | None:
    for process in processes:
        if process["failure"]:
            return f"{process['place']}: {process['failure']}"
    first = processes[0]
    for process in processes:
        if process["device"] != first["device"]:
            return (
                f"{first['place']} computes on {_words(first)}, but {process['place']} on "
                f"{_words(process)}: mend that node, or set DS_ACCELERATOR on all nodes "
                "(.deepspeed_env)"
            )
    return None


def _words(process: dict[str, str | None]) -> str:
    return "a GPU" if process["device"] == "cuda" else "the CPU"


def _not_met(place: str, patience: timedelta) -> str:
    return (
        f"the {os.environ['WORLD_SIZE']} processes did not meet at {place} "
        f"(MASTER_ADDR:MASTER_PORT) within {patience.total_seconds():.0f} s: see whether one "
        "of them failed to start, whether a firewall stands between the nodes, and whether "
        "another port (deepspeed --master_port) is free"
    )
