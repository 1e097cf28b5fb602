"""Who encodes and who decodes: groups that stay on one machine, and one encoder to a GPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from preprocessing.communicator import Communicator
from preprocessing.encoder import EncoderSettings

# What launchers and their scripts bind a process to GPUs with. An MPS server has GPUs of its own.
_BINDING_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_MPS_PIPE_DIRECTORY")
_GPU_FILES = Path("/dev")

# Two ranks of a machine with equal ones see the same GPUs.
Binding = tuple[str | None, ...]
Place = TypeVar("Place", bound=Hashable)


@dataclass(frozen=True)
class Group:
    """An encode rank, its decode ranks on the same machine, and which of its GPUs it takes."""

    machine: int
    encode_rank: int
    decode_ranks: tuple[int, ...]
    gpu: int = 0


@dataclass(frozen=True)
class Roles:
    """All groups in the order of their encode ranks; the first rank is always an encode rank.

    `gpus` are the GPUs that ranks of each machine see, by what names them in all the world.
    `shared` is how many encoders have a GPU that another one had first.
    """

    groups: tuple[Group, ...]
    gpus: Mapping[int, frozenset[str]]
    shared: int = 0

    def group_of(self, rank: int) -> Group:
        """The group of a rank."""
        return next(
            group
            for group in self.groups
            if rank == group.encode_rank or rank in group.decode_ranks
        )

    def __str__(self) -> str:
        """How many encoders, GPUs and decode ranks a machine has, in a line."""
        kinds = Counter(self._of_machine(machine) for machine in self.gpus)
        several = len(self.gpus) > 1
        told = "; ".join(
            f"{_counted(count, 'machine')} with {kind}" if several else kind
            for kind, count in kinds.items()
        )
        if self.shared:
            told += f"; {_counted(self.shared, 'encoder')} on a GPU that has another one already"
        idle = len(frozenset().union(*self.gpus.values())) - len(self.groups) + self.shared
        if idle > 0:
            told += (
                f"; idle: {_counted(idle, 'GPU')} (start more ranks a machine, or lower "
                "--decode-ranks-per-encoder)"
            )
        return told

    def _of_machine(self, machine: int) -> str:
        groups = [group for group in self.groups if group.machine == machine]
        gpus = len(self.gpus[machine])
        told = _counted(len(groups), "encoder")
        if gpus:
            told += f" on {min(len(groups), gpus)} of {_counted(gpus, 'GPU')}"
        if decoding := sum(len(group.decode_ranks) for group in groups):
            told += f" and {_counted(decoding, 'decode rank')}"
        return told


def candidates(
    machines: Sequence[int], bindings: Sequence[Binding], decode_ranks_per_encoder: int
) -> list[int]:
    """The ranks that would encode if GPUs never ran short; both sequences have an entry a rank.

    A machine's ranks that see the same GPUs are cut into groups of equal size, as many as it takes
    for none to have more decode ranks than asked for. So GPUs that any rank sees have a candidate,
    in whatever order the launcher has dealt them out.
    """
    width = decode_ranks_per_encoder + 1
    found = []
    for ranks in _alike(list(zip(machines, bindings, strict=True))).values():
        groups = -(-len(ranks) // width)
        found += [ranks[group * len(ranks) // groups] for group in range(groups)]
    return sorted(found)


def share_out(
    machines: Sequence[int], gpus: Sequence[Sequence[str]], asked: Sequence[int]
) -> Roles:
    """The roles of all ranks, from their machines and from the GPUs that candidates see.

    Every one of `asked`, the candidates in their order, takes the first of its GPUs that is free.
    One that finds none free decodes for the others of its machine, unless it has none of them;
    where a machine has no GPUs at all, all candidates encode.
    """
    seen = {
        machine: frozenset(name for rank in ranks for name in gpus[rank])
        for machine, ranks in _alike(machines).items()
    }
    taken: set[str] = set()
    encoding: dict[int, int] = {}
    shared = 0
    for rank in asked:
        free = [number for number, name in enumerate(gpus[rank]) if name not in taken]
        # The first rank shows the progress of all, which only an encode rank can.
        if free or rank == 0 or not seen[machines[rank]]:
            encoding[rank] = free[0] if free else 0
            taken.update(gpus[rank][number] for number in free[:1])
    groups = []
    for machine, ranks in _alike(machines).items():
        encoders = [rank for rank in ranks if rank in encoding]
        if not encoders:
            # Another container of the same machine may have had its GPUs first.
            encoders = [rank for rank in asked if machines[rank] == machine and gpus[rank]][:1]
            encoding[encoders[0]] = 0
            shared += 1
        decoding = [rank for rank in ranks if rank not in encoders]
        parts = _parts(decoding, len(encoders))
        groups += [
            Group(machine, rank, part, encoding[rank])
            for rank, part in zip(encoders, parts, strict=True)
        ]
    return Roles(tuple(sorted(groups, key=lambda group: group.encode_rank)), seen, shared)


def agree_on_roles(
    communicator: Communicator, settings: EncoderSettings, decode_ranks_per_encoder: int
) -> Roles:
    """The same roles on every rank; every rank must make this call."""
    on_gpus = settings.device == "cuda"
    binding = _gpu_binding() if on_gpus else ()
    told = communicator.gather_everywhere((communicator.machine, binding))
    machines = [machine for machine, _ in told]
    asked = candidates(machines, [own for _, own in told], decode_ranks_per_encoder)
    # Only these start CUDA: it takes seconds, and a machine may have 128 ranks.
    looks = on_gpus and communicator.rank in asked
    gpus = communicator.gather_everywhere(_visible_gpus() if looks else ())
    return share_out(machines, gpus, asked)


def _gpu_binding() -> Binding:
    """What decides which GPUs this rank sees, found without CUDA.

    Where Slurm confines each task to GPUs of its own (`--gpus-per-task`), CUDA_VISIBLE_DEVICES is 0
    for all of them, and only the files of their devices tell them apart.
    """
    files = sorted(
        path.name for path in _GPU_FILES.glob("nvidia[0-9]*") if os.access(path, os.R_OK | os.W_OK)
    )
    return (*(os.environ.get(name) for name in _BINDING_VARIABLES), *files)


def _visible_gpus() -> tuple[str, ...]:
    return tuple(
        str(torch.cuda.get_device_properties(number).uuid)
        for number in range(torch.cuda.device_count())
    )


def _alike(places: Sequence[Place]) -> dict[Place, list[int]]:
    """The ranks of each place, in the order of their first ones; `places` has one a rank."""
    ranks: dict[Place, list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    return ranks


def _parts(ranks: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """Ranks in `count` parts of neighbours, whose sizes differ by one at most."""
    for part in range(count):
        start, stop = (place * len(ranks) // count for place in (part, part + 1))
        yield tuple(ranks[start:stop])


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
