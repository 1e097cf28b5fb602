"""Three processes on two made-up nodes that go through the preflight's findings, one by one."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_nuwa.data.storage import Storage, storage_at
from megatron_nuwa.errors import UserError
from megatron_nuwa.ops import cpu
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.training import preflight as room
from megatron_nuwa.training import speed_probe
from megatron_nuwa.training.preflight import examine, preflight
from megatron_nuwa.training.processes import Processes, join_processes
from megatron_nuwa.training.recipe import load_recipe

HOSTS = ["alpha", "alpha", "beta"]
GIB = 2**30
# (kind of the outcome, its text or value)
Outcome = tuple[str, Any]


def play(rank: int, port: int, folder: str, results: Any) -> None:
    """One process: every scene in turn; its outcomes go into the queue."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(len(HOSTS)),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    outcomes: dict[str, Outcome] = {}
    with join_processes() as processes, patch.object(socket, "gethostname", lambda: HOSTS[rank]):
        for name, scene in SCENES.items():
            os.chdir(folder)
            try:
                outcomes[name] = ("returned", scene(processes))
            except UserError as error:
                outcomes[name] = (type(error).__name__, str(error))
            except Exception:
                outcomes[name] = ("defect", traceback.format_exc())
    results.put((rank, outcomes))


@contextmanager
def equal_speeds() -> Iterator[None]:
    """Timings of a busy test machine say nothing."""
    with (
        patch.object(speed_probe, "_matmul_speed", lambda device: 1e12),
        patch.object(speed_probe, "_best_speed", lambda device, transfer: 1e9),
        # Nor does whether there was a compiler.
        patch.object(cpu, "why_not", lambda query: None),
    ):
        yield


def check(processes: Processes, **options: Any) -> list[str]:
    recipe = load_recipe("relative.yaml")
    layout = Layout(1, 1, len(HOSTS), 1, "fp32", False, False, "flops")
    return preflight(recipe, options.pop("layout", layout), processes, **options)


def everything_right(processes: Processes) -> Any:
    with equal_speeds():
        warnings = check(processes, bytes_needed=1)
    return warnings, sorted(path.name for path in Path().iterdir())


def really_measured(processes: Processes) -> Any:
    recipe = load_recipe("relative.yaml")
    layout = Layout(1, 1, len(HOSTS), 1, "fp32", False, False, "flops")
    speeds = examine(recipe, layout, processes).speeds
    assert speeds is not None
    return len(speeds.matmul), sorted(speeds.links), min(speeds.matmul + speeds.all_reduce) > 0


def another_torch(processes: Processes) -> Any:
    real = metadata.version

    def version(package: str) -> str:
        return "2.12.0" if package == "torch" and processes.rank == 2 else real(package)

    with patch.object(metadata, "version", version):
        return check(processes)


def run_folder_of_its_own(processes: Processes) -> Any:
    if processes.rank == 2:
        os.chdir("node-with-its-own-disk")
    return check(processes)


def run_folder_of_a_file(processes: Processes) -> Any:
    recipe = load_recipe("relative.yaml", ["run=relative.yaml/run"])
    layout = Layout(1, 1, len(HOSTS), 1, "fp32", False, False, "flops")
    return preflight(recipe, layout, processes)


def corpus(processes: Processes, place: str) -> Any:
    real = room._fingerprint
    elsewhere = Path(place).absolute()

    def fingerprint(corpus: Storage) -> str | UserError:
        return real(storage_at(elsewhere / corpus.address) if processes.rank == 2 else corpus)

    with patch.object(room, "_fingerprint", fingerprint):
        return check(processes)


def little_memory(processes: Processes) -> Any:
    free = 4 * GIB if processes.rank == 2 else 5 * GIB
    with patch.object(room, "free_host_bytes", lambda: free):
        # alpha has two processes, so that 5 GiB hold 2 GiB each, and beta's 4 GiB one of 2.
        with equal_speeds():
            enough = check(processes, bytes_needed=2 * GIB)
        assert enough == []
        return check(processes, bytes_needed=3 * GIB)


def slow_device(processes: Processes) -> Any:
    speed = 1e11 if processes.rank == 1 else 1e12
    with equal_speeds(), patch.object(speed_probe, "_matmul_speed", lambda device: speed):
        return check(processes)


def without_kernels(processes: Processes, *, missing_on: Sequence[int]) -> Any:
    reason = (
        "_native_cpu.so was not built: no C++ compiler" if processes.rank in missing_on else None
    )
    with equal_speeds(), patch.object(cpu, "why_not", lambda query: reason):
        return check(processes)


def layout_for_four(processes: Processes) -> Any:
    return check(processes, layout=Layout(2, 1, 2, 1, "fp32", False, False, "flops"))


def mistake_of_the_last(processes: Processes) -> Any:
    def work() -> str:
        if processes.rank == 2:
            raise UserError("tokenizers.bpe bpe.json cannot be read")
        return "read"

    return processes.first_then_all(work)


SCENES: dict[str, Callable[[Processes], Any]] = {
    "everything right": everything_right,
    "really measured": really_measured,
    "another torch": another_torch,
    "run folder of its own": run_folder_of_its_own,
    "run folder of a file": run_folder_of_a_file,
    "corpus missing": lambda processes: corpus(processes, "nowhere"),
    "another corpus": lambda processes: corpus(processes, "node-with-its-own-disk"),
    "little memory": little_memory,
    "slow device": slow_device,
    "kernels missing": partial(without_kernels, missing_on=(0, 1, 2)),
    "kernels missing on one node": partial(without_kernels, missing_on=(2,)),
    "layout for four": layout_for_four,
    "mistake of the last": mistake_of_the_last,
    "still together": everything_right,
}
