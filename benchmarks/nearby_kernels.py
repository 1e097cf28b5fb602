"""Time this project's CUDA kernels one by one, from the device's own clock. Example:

python -m benchmarks.nearby_kernels --output benchmarks/results/nearby_kernels.json

benchmarks.nearby_attention times whole calls, which a GPU may finish before Python has sent the
next; this says what the kernels alone take, and, with --peers, what those of other attentions take:
forward and backward as one CUDA graph, which a GPU replays without Python. It needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.cases import Case, Load, cases
from benchmarks.harness.measure import reason_of
from benchmarks.harness.options import add_output, benchmark_parser, positive
from benchmarks.harness.peers import Peer, all_peers
from benchmarks.harness.report import Floors, device_name, write_json
from benchmarks.harness.timing import clock_of, copy_bandwidth
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.ops import nearby_attention

# By a part of a kernel's name, the more special first.
_COMPARED = ("video-3-causal", "video-7-causal")
_PEERS = ("cuda", "sdpa-flash", "sdpa-cudnn", "flex")
_KERNELS = {
    "Forward<": "forward",
    ", true>": "backward dK dV",
    "Backward<": "backward dQ",
    "query_statistics": "statistics",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        raise UserError("benchmarks.nearby_kernels needs a GPU, and torch sees none")
    device = torch.device("cuda")
    load, clock = Load.of(device, quick=False), clock_of(device)
    bytes_a_second = copy_bandwidth(clock, device, quick=False)
    reports = {}
    for case in cases(False):
        times = kernel_times(case, load, options.repeats)
        floors = Floors.of(case, load, bytes_a_second)
        reports[case.name] = {"microseconds": times, "floor_ms": floors.forward_backward_ms}
    _show(reports, device)
    peers: dict[str, dict[str, dict[str, float] | str]] = {
        case.name: _peers_times(case, load, options.peers, options.repeats)
        for case in cases(False)
        if case.name in _COMPARED and options.peers
    }
    _show_peers(peers)
    if options.output is not None:
        report = {
            "device": device_name(device),
            "torch": torch.__version__,
            "batch": load.batch,
            "heads": load.heads,
            "head_size": load.head_size,
            "dtype": "bfloat16",
            "copy_gigabytes_a_second": bytes_a_second / 1e9,
            "cases": reports,
            "replayed_milliseconds": peers,
        }
        write_json(options.output, report)
    return 0


def kernel_times(case: Case, load: Load, repeats: int) -> dict[str, float]:
    """Median microseconds of each kernel, with the L2 cache emptied before each pass."""
    grid, context_grid, extent, causal = case.geometry
    tensors = [
        load.random(cells, seed).requires_grad_()
        for seed, cells in enumerate((grid.cells, context_grid.cells, context_grid.cells))
    ]
    grad = load.random(grid.cells, 3)
    flush = torch.empty(1 << 29, dtype=torch.uint8, device=load.device)

    def call() -> Tensor:
        return nearby_attention(
            *tensors,
            grid=grid,
            context_grid=context_grid,
            extent=extent,
            causal=causal,
            backend="cuda",
        )

    torch.autograd.grad(call(), tensors, grad)  # tables are made once
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            flush.zero_()
            output = call()
            flush.zero_()
            torch.autograd.grad(output, tensors, grad)
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in profiler.events():
        for part, kernel in _KERNELS.items():
            if "megatron_nuwa" in event.name and part in event.name:
                times[kernel].append(event.device_time)
                break
    return {kernel: statistics.median(found) for kernel, found in times.items()}


def _peers_times(
    case: Case, load: Load, names: Sequence[str], repeats: int
) -> dict[str, dict[str, float] | str]:
    """Milliseconds of each peer's forward pass, and of both passes; or why there are none."""
    found: dict[str, dict[str, float] | str] = {}
    for peer in all_peers(load.device):
        if peer.name not in names:
            continue
        try:
            found[peer.name] = _replayed(peer, case, load, repeats)
        except Exception as error:  # a peer that breaks must not end the run
            found[peer.name] = reason_of(error)
        torch.cuda.empty_cache()
    return found


def _replayed(peer: Peer, case: Case, load: Load, repeats: int) -> dict[str, float]:
    grids = (case.geometry.grid, *2 * (case.geometry.context_grid,))
    leaves = [
        peer.layout.pack(load.random(grid.cells, seed), grid).requires_grad_()
        for seed, grid in enumerate(grids)
    ]
    call = peer.make(case, load)
    grad = torch.randn_like(call(*leaves))

    def forward() -> object:
        with torch.no_grad():
            return call(*leaves)

    def train() -> object:
        return torch.autograd.grad(call(*leaves), leaves, grad)

    return {
        "forward": _replay_ms(forward, repeats),
        "forward_backward": _replay_ms(train, repeats),
    }


def _replay_ms(step: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a step, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()  # what it returns lives as long as the graph
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    del kept
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))


def _show_peers(peers: dict[str, dict[str, dict[str, float] | str]]) -> None:
    for case, rows in peers.items():
        table = Table("replayed, ms", "forward", "forward + backward", "of ours", title=case)
        ours = rows.get(_PEERS[0])
        for name, times in rows.items():
            if isinstance(times, str):
                table.add_row(name, times)
                continue
            total = times["forward_backward"]
            ratio = f"{total / ours['forward_backward']:.2f}×" if isinstance(ours, dict) else "–"
            table.add_row(name, f"{times['forward']:.3f}", f"{total:.3f}", ratio)
        Console(width=120).print(table)


def _show(reports: dict[str, dict[str, object]], device: torch.device) -> None:
    kernels = list(_KERNELS.values())
    table = Table("µs", *kernels, "all", "of floor", title=device_name(device))
    for name, report in reports.items():
        times, floor = report["microseconds"], report["floor_ms"]
        assert isinstance(times, dict)
        assert isinstance(floor, float)
        total = sum(times.values())
        cells = (f"{times[kernel]:.0f}" if kernel in times else "–" for kernel in kernels)
        table.add_row(name, *cells, f"{total:.0f}", f"{floor * 1e3 / total:.0%}")
    Console(width=120).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("nearby_kernels", __doc__)
    parser.add_argument(
        "--repeats", type=positive, default=12, metavar="N", help="times of a median (default: 12)"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=_PEERS,
        default=(),
        help=f"what else to time at {', '.join(_COMPARED)}",
    )
    add_output(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
