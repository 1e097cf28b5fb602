"""What OpenMPI and Slurm say about a process, in the variables that PyTorch reads."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

from megatron_nuwa.errors import UserError

# Below the ports that Linux hands out by itself, so that a job's own connections keep off.
_SLURM_PORTS = range(15_000, 30_000)
_FIRST_HOST = re.compile(r"(?P<prefix>[^,\[]+)(?:\[(?P<number>\d+)[^\]]*\](?P<suffix>[^,\[]*))?")


def adopt_launcher_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the launcher's variables.

    Under `mpirun` (OpenMPI) and inside an `srun` step, with one task a process. Where RANK is set
    already (by deepspeed or torchrun), nothing changes; MASTER_ADDR and MASTER_PORT win where
    they are set.
    """
    if "RANK" in os.environ:
        return
    if _is_openmpi(os.environ):
        found = _openmpi(os.environ)
    elif _is_slurm_step(os.environ):
        found = _slurm(os.environ)
    else:
        return
    for name, value in found.items():
        os.environ.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first name of Slurm's list of nodes: `gpu[07-12,20],cpu1` begins with `gpu07`."""
    match = _FIRST_HOST.match(nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST is '{nodes}', which names no node; set MASTER_ADDR")
    return match["prefix"] + (match["number"] or "") + (match["suffix"] or "")


def _is_openmpi(environment: Mapping[str, str]) -> bool:
    return int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    # The batch script itself has a SLURM_PROCID too, but is no task of a step.
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _openmpi(environment: Mapping[str, str]) -> dict[str, str]:
    found = {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": environment["OMPI_COMM_WORLD_SIZE"],
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
    }
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return found
    one_node = environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == found["WORLD_SIZE"]
    address, port = _agree_by_mpi(int(found["WORLD_SIZE"]), one_node)
    return {**found, "MASTER_ADDR": address, "MASTER_PORT": port}


def _agree_by_mpi(size: int, one_node: bool) -> tuple[str, str]:
    """Address and free port of the first process, as all processes learn them over MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "mpirun's processes need MASTER_ADDR and MASTER_PORT where mpi4py finds no MPI; pass "
            "them with -x MASTER_ADDR=HOST -x MASTER_PORT=PORT"
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != size:
        raise UserError(
            f"mpi4py was built for another MPI than the mpirun that started {size} processes; "
            "pass -x MASTER_ADDR=HOST -x MASTER_PORT=PORT"
        )
    mine = None
    if world.Get_rank() == 0:
        mine = ("127.0.0.1" if one_node else socket.gethostname(), str(free_port()))
    address, port = world.bcast(mine)
    # Finalising waits for all processes: at exit, one that failed would wait for the others.
    MPI.Finalize()
    return address, port


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _slurm(environment: Mapping[str, str]) -> dict[str, str]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    # One port a job step, which all its tasks can work out.
    number = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(_SLURM_PORTS[number % len(_SLURM_PORTS)]),
    }
