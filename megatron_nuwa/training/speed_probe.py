"""How fast every process's device and the links between processes are, in about two seconds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from megatron_nuwa.training.processes import Processes

# A device below this share of the median device is named, a link below that share of the median
# link of its kind (inside a node, between nodes).
SLOW_DEVICE = 0.5
SLOW_LINK = 0.25
# Links of GPUs below so many bytes/s (inside a node: True) are no NVLink and no InfiniBand.
_FEWEST_OF_GPUS = {True: 5e9, False: 3e9}
# So much that a transfer's beginning does not count.
_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
_MATMUL_SECONDS = 0.2
_TRIES = 5
# Fewer of a kind have no median that would tell the slow one from the fast one.
_FEWEST_TO_COMPARE = 3

Pair = tuple[int, int]


@dataclass(frozen=True)
class Speeds:
    """Of all processes: FLOP/s and all-reduce bytes/s by rank, bytes/s of the measured links."""

    matmul: list[float]
    all_reduce: list[float]
    links: dict[Pair, float]


def measure_speeds(processes: Processes, hosts: Sequence[str]) -> Speeds:
    """Time a product on every device, an all-reduce, and a transfer over each ring link.

    They move 4 MiB between CPUs, 64 MiB between GPUs.

    `hosts` are the nodes by rank. Every process calls it and gets the same result.
    """
    mine = (_matmul_speed(processes.device), _all_reduce_speed(processes))
    links = _link_speeds(processes, link_rounds(hosts))
    gathered = processes.gather((*mine, links))
    every_link = {pair: speed for *_, found in gathered for pair, speed in found.items()}
    return Speeds([row[0] for row in gathered], [row[1] for row in gathered], every_link)


def slow_parts(speeds: Speeds, hosts: Sequence[str], on_gpus: bool) -> list[str]:
    """One sentence for every device and link that is far slower than its equals.

    And one where the links of GPUs are slow all together.
    """
    found = []
    usual = median(speeds.matmul)
    for rank, speed in enumerate(speeds.matmul):
        if len(speeds.matmul) > 1 and speed < SLOW_DEVICE * usual:
            found.append(
                f"the device of process {rank} on {hosts[rank]} is slow: "
                f"{speed / 1e12:.3g} TFLOP/s, the median is {usual / 1e12:.3g}"
            )
    kinds: dict[bool, list[Pair]] = defaultdict(list)
    for one, other in speeds.links:
        kinds[hosts[one] == hosts[other]].append((one, other))
    for is_inside, pairs in kinds.items():
        usual = median(speeds.links[pair] for pair in pairs)
        if on_gpus and usual < _FEWEST_OF_GPUS[is_inside]:
            where = "inside the nodes" if is_inside else "between the nodes"
            found.append(
                f"the links {where} are slow, {usual / 1e9:.3g} GB/s at the median: see with "
                "NCCL_DEBUG=INFO whether NCCL finds faster ones, if there are any"
            )
        for one, other in sorted(pairs):
            speed = speeds.links[one, other]
            if len(pairs) >= _FEWEST_TO_COMPARE and speed < SLOW_LINK * usual:
                found.append(
                    f"the link of process {one} on {hosts[one]} and process {other} on "
                    f"{hosts[other]} is slow: {speed / 1e9:.3g} GB/s, the median is "
                    f"{usual / 1e9:.3g}"
                )
    return found


def link_rounds(hosts: Sequence[str]) -> list[list[Pair]]:
    """Which pairs exchange at the same time: rounds in which every process has one partner.

    Together they are a ring inside each node, and a ring over the nodes for each place in a node,
    so that every process's link to its own node and its link out of it are used.
    """
    nodes: dict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(hosts):
        nodes[host].append(rank)
    rings = list(nodes.values())
    places = max(map(len, rings), default=0)
    rings += [[node[p] for node in nodes.values() if p < len(node)] for p in range(places)]
    pairs = {
        (min(one, other), max(one, other))
        for ring in rings
        for one, other in zip(ring, ring[1:] + ring[:1], strict=True)
        if one != other
    }
    rounds: list[list[Pair]] = []
    for pair in sorted(pairs):
        free = next((r for r in rounds if not any(set(pair) & set(other) for other in r)), None)
        if free is None:
            rounds.append(free := [])
        free.append(pair)
    return rounds


def _matmul_speed(device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    side, dtype = (4096, torch.bfloat16) if on_gpu else (512, torch.float32)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    (matrix @ matrix)[0, 0].item()
    best = 0.0
    end = time.perf_counter() + _MATMUL_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def _all_reduce_speed(processes: Processes) -> float:
    if processes.world_size == 1:
        return 0.0
    buffer = torch.zeros(_BYTES[processes.device.type] // 4, device=processes.device)
    return _best_speed(processes.device, lambda: dist.all_reduce(buffer))


def _link_speeds(processes: Processes, rounds: Sequence[Sequence[Pair]]) -> dict[Pair, float]:
    """The links that this process measured as the lower rank of a pair."""
    speeds: dict[Pair, float] = {}
    outgoing = torch.zeros(_BYTES[processes.device.type] // 4, device=processes.device)
    incoming = torch.empty_like(outgoing)
    for pairs in rounds:
        for pair in pairs:
            if processes.rank not in pair:
                continue
            partner = sum(pair) - processes.rank

            def exchange(partner: int = partner) -> None:
                operations = [
                    dist.P2POp(dist.isend, outgoing, partner),
                    dist.P2POp(dist.irecv, incoming, partner),
                ]
                for request in dist.batch_isend_irecv(operations):
                    request.wait()

            speed = _best_speed(processes.device, exchange)
            if processes.rank == pair[0]:
                speeds[pair] = speed
    return speeds


def _best_speed(device: torch.device, transfer: Callable[[], object]) -> float:
    """Bytes/s of the fastest of some transfers; the first opens the connection."""
    best = 0.0
    for attempt in range(1 + _TRIES):
        start = time.perf_counter()
        transfer()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            best = max(best, _BYTES[device.type] / (time.perf_counter() - start))
    return best
