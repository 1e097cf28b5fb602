"""The memory of a running farm, process by process, beside how far the farm is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import psutil
from process_memory import own_memory

from preprocessing.state import FarmFolder

# Often enough to meet every shard of some hundred small items.
LOOK_SECONDS = 0.02
# After the loading of TensorBoard.
SETTLING_READINGS = 10
PARTS = 5
_RANK = ["-m", "preprocessing"]
_WORKER = ["-m", "megatron_nuwa.decoders.worker"]


@dataclass(frozen=True)
class Reading:
    """What each process of a farm held when so many items were in finished shards.

    `own` is in bytes, by what the process is: "launcher", "rank 0", "worker of rank 0" and so on.
    """

    items: int
    own: dict[str, int]


def watch_farm(
    farm: psutil.Popen, output: Path, items_per_shard: int, wanted: int | None = None
) -> list[Reading]:
    """A reading at every finished shard, but for the first quarter of them.

    Those until the first rank has settled with TensorBoard, which it loads after ten seconds and
    which takes 18 MB once, are left out as well. Ends with the farm, or with `wanted` readings.
    """
    readings: list[Reading] = []
    settled: int | None = None
    tensorboard = FarmFolder(output).tensorboard
    shards = 0
    while farm.poll() is None and not (wanted and settled and len(readings) >= settled + wanted):
        found = sum(1 for _ in output.glob("shard-*.json")) if output.exists() else 0
        if found != shards:
            shards = found
            readings.append(Reading(shards * items_per_shard, read_farm(farm)))
            if settled is None and tensorboard.is_dir() and any(tensorboard.iterdir()):
                settled = len(readings) + SETTLING_READINGS
        try:
            farm.wait(LOOK_SECONDS)
        except psutil.TimeoutExpired:
            continue
    return readings[max(settled or 0, len(readings) // 4) :]


def read_farm(farm: psutil.Popen) -> dict[str, int]:
    """Own memory of the farm's lasting processes, by what they are.

    An ffmpeg, which lives for one clip, can pile nothing up.
    """
    held: dict[str, int] = {}
    ranks: set[int] = set()
    for process in [farm, *farm.children(recursive=True)]:
        try:
            command = process.cmdline()[1:3]
            name = "launcher"
            if command in (_RANK, _WORKER):
                rank = process.environ().get("OMPI_COMM_WORLD_RANK", "0")
                name = f"rank {rank}" if command == _RANK else f"worker of rank {rank}"
            elif process.pid != farm.pid:
                continue
            if command == _RANK:
                # Between vfork and exec a child still is its parent.
                if process.ppid() in ranks:
                    continue
                ranks.add(process.pid)
            held[name] = held.get(name, 0) + own_memory(process.pid)
        except (psutil.Error, ProcessLookupError):
            continue
    return held


def growth(readings: Sequence[Reading], name: str) -> float:
    """Bytes an item by which a process grows: the median of the slopes in `PARTS` of the readings.

    Growth that goes on is in every part. A step that comes once, such as a table of the interpreter
    that is rebuilt at twice its size, is in one of them; `step` tells of it.
    """
    held = held_by(readings, name)
    edges = [len(held) * part // PARTS for part in range(PARTS + 1)]
    return statistics.median(_slope(held[start:end]) for start, end in pairwise(edges))


def _slope(held: Sequence[tuple[int, int]]) -> float:
    return statistics.median(
        (late - early) / (done - before) for (before, early), (done, late) in combinations(held, 2)
    )


def step(readings: Sequence[Reading], name: str) -> float:
    """Bytes by which a process is larger in the last quarter of the readings than in the first."""
    held = [own for _, own in held_by(readings, name)]
    quarter = -(-len(held) // 4)
    return statistics.median(held[-quarter:]) - statistics.median(held[:quarter])


def held_by(readings: Sequence[Reading], name: str) -> list[tuple[int, int]]:
    """Items and bytes of the readings that met the process; a worker may just be replaced."""
    return [(reading.items, reading.own[name]) for reading in readings if name in reading.own]
