"""Time this project's CUDA kernels one by one, from the device's own clock. Example:

python -m benchmarks.nearby_kernels --output benchmarks/results/nearby_kernels.json

benchmarks.nearby_attention times whole calls, which a GPU may finish before Python has sent the
next; this says what the kernels alone take. It needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.cases import Case, Load, cases
from benchmarks.harness.options import add_output, benchmark_parser, positive
from benchmarks.harness.report import Floors, device_name, write_json
from benchmarks.harness.timing import clock_of, copy_bandwidth
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.ops import nearby_attention

# By a part of a kernel's name, the more special first.
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
    add_output(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
