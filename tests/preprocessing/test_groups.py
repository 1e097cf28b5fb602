"""Which ranks encode and which decode, on machines and GPUs of all sorts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents, environment, mpirun

from preprocessing import roles as farm_roles
from preprocessing.__main__ import main
from preprocessing.communicator import LoneCommunicator
from preprocessing.encoder import EncoderSettings
from preprocessing.roles import Roles, agree_on_roles, candidates, share_out

ON_CPUS = EncoderSettings(device="cpu", precision="float32", compiled=False)
ON_GPUS = EncoderSettings(device="cuda", precision="bfloat16", compiled=True)


class OneOfMany(LoneCommunicator):
    """A rank that is a thread."""

    def __init__(
        self, rank: int, machine: int, everybody: threading.Barrier, told: list[Any]
    ) -> None:
        self.rank, self.machine = rank, machine
        self._everybody, self._told = everybody, told

    def gather_everywhere(self, value: Any) -> list[Any]:
        self._told[self.rank] = value
        self._everybody.wait()
        found = list(self._told)
        self._everybody.wait()
        return found


def agreed(
    monkeypatch: pytest.MonkeyPatch,
    machines: Sequence[int],
    decode_ranks: int,
    visible: Callable[[int], str],
) -> tuple[Roles, set[int]]:
    """What ranks agree on whose CUDA_VISIBLE_DEVICES is `visible`, and which ones start CUDA."""
    own, started = threading.local(), set()

    def visible_gpus() -> tuple[str, ...]:
        started.add(own.rank)
        numbers = [number for number in visible(own.rank).split(",") if number]
        return tuple(f"machine {machines[own.rank]} GPU {number}" for number in numbers)

    monkeypatch.setattr(farm_roles, "_gpu_binding", lambda: (visible(own.rank),))
    monkeypatch.setattr(farm_roles, "_visible_gpus", visible_gpus)
    everybody = threading.Barrier(len(machines), timeout=60)
    told: list[Any] = [None] * len(machines)
    found: list[Any] = [None] * len(machines)

    def work(rank: int) -> None:
        own.rank = rank
        communicator = OneOfMany(rank, machines[rank], everybody, told)
        found[rank] = agree_on_roles(communicator, ON_GPUS, decode_ranks)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(machines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(roles == found[0] for roles in found)
    check(found[0], machines)
    return found[0], started


def roles_on_gpus(machines: Sequence[int], decode_ranks: int, gpus: int = 8) -> Roles:
    """The roles where every rank sees all GPUs of its machine."""
    asked = candidates(machines, [()] * len(machines), decode_ranks)
    seen = [
        tuple(f"machine {machine} GPU {number}" for number in range(gpus)) if rank in asked else ()
        for rank, machine in enumerate(machines)
    ]
    return share_out(machines, seen, asked)


def check(roles: Roles, machines: Sequence[int]) -> None:
    """Every rank has one role, and groups stay on their machine."""
    everybody = [
        rank for group in roles.groups for rank in (group.encode_rank, *group.decode_ranks)
    ]
    assert sorted(everybody) == list(range(len(machines)))
    for group in roles.groups:
        on = {machines[rank] for rank in (group.encode_rank, *group.decode_ranks)}
        assert on == {group.machine}
        assert all(roles.group_of(rank) == group for rank in group.decode_ranks)
    assert roles.groups[0].encode_rank == 0


BLOCK = [rank // 128 * 128 for rank in range(1024)]
CYCLIC = [rank % 8 for rank in range(1024)]


@pytest.mark.parametrize(
    ("machines", "decode_ranks"),
    [
        (BLOCK, 15),
        (CYCLIC, 15),
        # Widths that do not divide the ranks of a machine.
        ([rank // 126 * 126 for rank in range(1008)], 14),
        ([rank // 120 * 120 for rank in range(960)], 15),
        # Without decode ranks there would be 16 encoders to a GPU.
        (BLOCK, 0),
    ],
    ids=["block", "cyclic", "126 ranks", "120 ranks", "no decode ranks"],
)
def test_every_gpu_has_one_encoder(machines: list[int], decode_ranks: int) -> None:
    roles = roles_on_gpus(machines, decode_ranks)
    check(roles, machines)
    used = Counter((group.machine, group.gpu) for group in roles.groups)
    assert len(used) == 64
    assert set(used.values()) == {1}
    sizes = {len(group.decode_ranks) for group in roles.groups}
    assert max(sizes) - min(sizes) <= 1
    assert "8 machines with 8 encoders on 8 of 8 GPUs and 1" in str(roles)
    assert "idle" not in str(roles)


def test_gpus_that_stay_idle_are_told() -> None:
    machines = [0] * 128 + [128] * 40
    roles = roles_on_gpus(machines, 15)
    check(roles, machines)
    assert str(roles) == (
        "1 machine with 8 encoders on 8 of 8 GPUs and 120 decode ranks; "
        "1 machine with 3 encoders on 3 of 8 GPUs and 37 decode ranks; "
        "idle: 5 GPUs (start more ranks a machine, or lower --decode-ranks-per-encoder)"
    )


ALL, FIRST, SECOND = "0,1,2,3,4,5,6,7", "0,1,2,3", "4,5,6,7"


@pytest.mark.parametrize(
    ("visible", "encoders"),
    [
        (lambda rank: ALL, range(0, 128, 16)),
        (lambda rank: str(rank // 16), range(0, 128, 16)),
        # CUDA_VISIBLE_DEVICES=$((OMPI_COMM_WORLD_LOCAL_RANK % 8)), --gpu-bind=map_gpu:0,…,7.
        (lambda rank: str(rank % 8), range(8)),
        # The GPUs of each socket, for the ranks on its cores.
        (lambda rank: FIRST if rank < 64 else SECOND, range(0, 128, 16)),
        (lambda rank: SECOND if rank % 2 else FIRST, (0, 1, 32, 33, 64, 65, 96, 97)),
        # Every rank begins at another GPU, and sees all.
        (lambda rank: ",".join(str((rank + n) % 8) for n in range(8)), range(8)),
    ],
    ids=["all", "block", "cyclic", "sockets", "cyclic sockets", "rotated"],
)
@pytest.mark.parametrize("nodes", [1, 2])
def test_bound_ranks_use_all_gpus_in_whatever_order_they_are_dealt_out(
    monkeypatch: pytest.MonkeyPatch,
    visible: Callable[[int], str],
    encoders: Sequence[int],
    nodes: int,
) -> None:
    machines = [rank // 128 * 128 for rank in range(nodes * 128)]
    roles, started = agreed(monkeypatch, machines, 15, lambda rank: visible(rank % 128))
    found = [group.encode_rank for group in roles.groups]
    assert found == [start + rank for start in range(0, nodes * 128, 128) for rank in encoders]
    # Nobody else needs to know.
    assert started == set(found)
    numbers = [visible(group.encode_rank % 128).split(",")[group.gpu] for group in roles.groups]
    assert sorted(numbers) == sorted(ALL.split(",") * nodes)
    assert {len(group.decode_ranks) for group in roles.groups} == {15}
    told = "8 encoders on 8 of 8 GPUs and 120 decode ranks"
    assert str(roles) == (told if nodes == 1 else f"2 machines with {told}")


def test_ranks_that_see_no_gpu_decode_for_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, _ = agreed(monkeypatch, [0] * 128, 15, lambda rank: "" if rank % 16 else str(rank // 16))
    assert [group.encode_rank for group in roles.groups] == list(range(0, 128, 16))
    assert str(roles) == "8 encoders on 8 of 8 GPUs and 120 decode ranks"
    # The first rank has to encode, and says that it cannot.
    roles = share_out([0, 0], [(), ("GPU 0",)], [0, 1])
    assert [group.encode_rank for group in roles.groups] == [0, 1]


def test_idle_gpus_of_bound_ranks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, _ = agreed(monkeypatch, [0] * 12, 15, lambda rank: SECOND if rank % 2 else FIRST)
    assert str(roles).startswith(
        "2 encoders on 2 of 8 GPUs and 10 decode ranks; idle: 6 GPUs (start more ranks"
    )


def test_what_binds_a_rank_to_gpus_is_read_without_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", None)
    monkeypatch.setattr(farm_roles, "_GPU_FILES", tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_MPS_PIPE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    seen = [farm_roles._gpu_binding()]
    for value in ("", "0", "0,1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        seen.append(farm_roles._gpu_binding())
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mps0")
    seen.append(farm_roles._gpu_binding())
    for name in ("nvidia0", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    # What Slurm confines a task to; file modes would not keep root out.
    for own in ("nvidia0", "nvidia10"):
        monkeypatch.setattr(os, "access", lambda path, mode, own=own: path.name == own)
        seen.append(farm_roles._gpu_binding())
    assert len(set(seen)) == len(seen)


def test_containers_on_one_machine_do_not_take_the_same_gpu() -> None:
    seen = [("GPU 0", "GPU 1")] * 3
    roles = share_out([0, 1, 2], seen, [0, 1, 2])
    assert [group.gpu for group in roles.groups] == [0, 1, 0]
    assert roles.shared == 1
    assert "1 encoder on a GPU that has another one already" in str(roles)
    assert "idle" not in str(roles)


@pytest.mark.parametrize(
    ("machines", "decode_ranks", "groups", "told"),
    [
        ([0], 0, [(0, ())], "1 encoder"),
        ([0, 0], 0, [(0, ()), (1, ())], "2 encoders"),
        ([0, 0], 7, [(0, (1,))], "1 encoder and 1 decode rank"),
        # No group is larger than asked for, and none much smaller than the others.
        ([0] * 5, 3, [(0, (1,)), (2, (3, 4))], "2 encoders and 3 decode ranks"),
        (
            [0, 1, 0, 1, 0],
            2,
            [(0, (2, 4)), (1, (3,))],
            "1 machine with 1 encoder and 2 decode ranks; "
            "1 machine with 1 encoder and 1 decode rank",
        ),
    ],
)
def test_roles_on_cpus(
    machines: list[int],
    decode_ranks: int,
    groups: list[tuple[int, tuple[int, ...]]],
    told: str,
) -> None:
    nothing: list[tuple[str, ...]] = [()] * len(machines)
    roles = share_out(machines, nothing, candidates(machines, nothing, decode_ranks))
    check(roles, machines)
    assert [(group.encode_rank, group.decode_ranks) for group in roles.groups] == groups
    assert str(roles) == told


def test_lone_process_encodes() -> None:
    roles = agree_on_roles(LoneCommunicator(), ON_CPUS, 0)
    assert [group.encode_rank for group in roles.groups] == [0]


def test_gpus_are_known_by_what_names_them_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}")
    )
    roles = agree_on_roles(LoneCommunicator(), ON_GPUS, 0)
    assert roles.gpus == {0: {"GPU-0", "GPU-1"}}
    assert str(roles).startswith("1 encoder on 1 of 2 GPUs; idle: 1 GPU (start more ranks")


# A farm whose ranks believe that a launcher has dealt them out to two machines in turn.
CYCLIC_FARM = """
import sys
from preprocessing import communicator
from preprocessing.__main__ import main

class OfTwoMachines(communicator.MpiCommunicator):
    def __init__(self):
        super().__init__()
        assert self.machine == 0
        self.machine = self.rank % 2

communicator.MpiCommunicator = OfTwoMachines
sys.exit(main(sys.argv[1:]))
"""


def test_cyclic_placement_changes_no_byte(media: Path, tools: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": n, "media": f"image{n % 6}.png", "captions": CAPTIONS} for n in range(12)
    ]
    manifest = write_manifest(media / "cyclic.jsonl", rows)
    lone = tokenize_command(manifest, tmp_path / "lone", tools, "--items-per-shard", "3")
    assert main(lone) == 0
    command = [*mpirun(4), sys.executable, "-c", CYCLIC_FARM]
    command += tokenize_command(manifest, tmp_path / "cyclic", tools, "--items-per-shard", "3")
    done = subprocess.run(
        [*command, "--decode-ranks-per-encoder", "1"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tokenize: 2 machines with 1 encoder and 1 decode rank\n" in done.stdout
    assert contents(tmp_path / "cyclic") == contents(tmp_path / "lone")
