"""Who encodes and who decodes: groups that stay on one machine, and one encoder to a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from preprocessing.communicator import Communicator
from preprocessing.encoder import EncoderSettings


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

    `gpus` are the GPUs of each machine, by what names them in all the world. `shared` is how many
    encoders have a GPU that another one had first.
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
        idle = sum(map(len, self.gpus.values())) - len(self.groups) + self.shared
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


def candidates(machines: Sequence[int], decode_ranks_per_encoder: int) -> list[int]:
    """The ranks that would encode if GPUs never ran short; `machines` has one number a rank.

    A machine's ranks are cut into groups of equal size, as many as it takes for none to have more
    decode ranks than asked for.
    """
    width = decode_ranks_per_encoder + 1
    found = []
    for ranks in _by_machine(machines).values():
        groups = -(-len(ranks) // width)
        found += [ranks[group * len(ranks) // groups] for group in range(groups)]
    return sorted(found)


def share_out(
    machines: Sequence[int], gpus: Sequence[Sequence[str]], decode_ranks_per_encoder: int
) -> Roles:
    """The roles of all ranks, from their machines and from the GPUs that candidates see.

    Every candidate takes the first of its GPUs that is free. One that finds none free decodes for
    the others of its machine, unless it has none of them.
    """
    taken: set[str] = set()
    encoding: dict[int, int] = {}
    shared = 0
    asked = candidates(machines, decode_ranks_per_encoder)
    for rank in asked:
        free = [number for number, name in enumerate(gpus[rank]) if name not in taken]
        if free or not gpus[rank]:
            encoding[rank] = free[0] if free else 0
            taken.update(gpus[rank][number] for number in free[:1])
    groups = []
    for machine, ranks in _by_machine(machines).items():
        encoders = [rank for rank in ranks if rank in encoding]
        if not encoders:
            # Another container of the same machine may have had its GPUs first.
            encoders = [rank for rank in ranks if rank in asked][:1]
            encoding[encoders[0]] = 0
            shared += 1
        decoding = [rank for rank in ranks if rank not in encoders]
        parts = _parts(decoding, len(encoders))
        groups += [
            Group(machine, rank, part, encoding[rank])
            for rank, part in zip(encoders, parts, strict=True)
        ]
    seen = {
        machine: frozenset(name for rank in ranks for name in gpus[rank])
        for machine, ranks in _by_machine(machines).items()
    }
    return Roles(tuple(sorted(groups, key=lambda group: group.encode_rank)), seen, shared)


def agree_on_roles(
    communicator: Communicator, settings: EncoderSettings, decode_ranks_per_encoder: int
) -> Roles:
    """The same roles on every rank; every rank must make this call."""
    machines = communicator.gather_everywhere(communicator.machine)
    # Only these start CUDA: it takes seconds, and a machine may have 128 ranks.
    looks = settings.device == "cuda" and communicator.rank in candidates(
        machines, decode_ranks_per_encoder
    )
    gpus = communicator.gather_everywhere(_visible_gpus() if looks else ())
    return share_out(machines, gpus, decode_ranks_per_encoder)


def _visible_gpus() -> tuple[str, ...]:
    return tuple(
        str(torch.cuda.get_device_properties(number).uuid)
        for number in range(torch.cuda.device_count())
    )


def _by_machine(machines: Sequence[int]) -> dict[int, list[int]]:
    ranks: dict[int, list[int]] = {}
    for rank, machine in enumerate(machines):
        ranks.setdefault(machine, []).append(rank)
    return ranks


def _parts(ranks: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """Ranks in `count` parts of neighbours, whose sizes differ by one at most."""
    for part in range(count):
        start, stop = (place * len(ranks) // count for place in (part, part + 1))
        yield tuple(ranks[start:stop])


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
