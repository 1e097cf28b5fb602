"""Time nearby attention against everything else that computes it. Example, on two cores:

OMP_NUM_THREADS=2 python -m benchmarks.nearby_attention --cases video-3-causal video-7-causal
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness.cases import Load, cases
from benchmarks.harness.measure import measure_case
from benchmarks.harness.options import benchmark_parser, positive
from benchmarks.harness.peers import all_peers
from benchmarks.harness.report import (
    Floors,
    case_json,
    device_name,
    file_stem,
    show_case,
    write_report,
)
from benchmarks.harness.timing import clock_of, copy_bandwidth
from megatron_nuwa.command_line import output_file
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.parallel.accelerator import default_device
from megatron_nuwa.training.progress import track

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 when a backend of this project gave a wrong result."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device) if options.device else default_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    chosen_cases = _chosen("--cases", options.cases, {c.name: c for c in cases(options.quick)})
    peers = _chosen("--peers", options.peers, {p.name: p for p in all_peers(device)})
    load, clock = Load.of(device, options.quick), clock_of(device)
    repeats = options.repeats or (2 if options.quick else 20)
    bytes_a_second = copy_bandwidth(clock, device, options.quick)

    console = Console() if sys.stdout.isatty() else Console(width=180)
    console.print(
        f"{device_name(device)} · torch {torch.__version__} · batch {load.batch}, "
        f"{load.heads} heads of {load.head_size}, {str(load.dtype).removeprefix('torch.')} · "
        f"copy {bytes_a_second / 1e9:.1f} GB/s\n",
        highlight=False,
    )
    reports, is_right = [], True
    for case in chosen_cases:
        floors = Floors.of(case, load, bytes_a_second)
        rows = measure_case(case, load, peers, clock, repeats)
        results = list(track(rows, case.name, total=len(peers)))
        is_right &= not any((r.reason or "").startswith("gives another result") for r in results)
        show_case(console, case, floors, results, device_name(device))
        reports.append(case_json(case, floors, results))

    output = options.output
    if output is None and not (options.quick or options.cases or options.peers):
        output = RESULTS / f"nearby_attention_{file_stem(device)}.json"
    if output is not None:
        write_report(output, load, bytes_a_second, repeats, reports)
        console.print(f"written: {output}", highlight=False, soft_wrap=True)
    return 0 if is_right else 1


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("nearby_attention", __doc__)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--cases", nargs="+", metavar="NAME", help=_names(cases(False)))
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help="; ".join(
            f"on {kind} {_names(all_peers(torch.device(kind)))}" for kind in ("cpu", "cuda")
        ),
    )
    parser.add_argument(
        "--repeats", type=positive, metavar="N", help="times a median is taken of (default: 20)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny tensors, to try this command")
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="JSON to write (default: one a device in benchmarks/results, for a run of everything)",
    )
    return parser


def _names(choices: Sequence[object]) -> str:
    return f"default: all of {', '.join(c.name for c in choices)}"  # type: ignore[attr-defined]


def _chosen(flag: str, names: Sequence[str] | None, known: dict[str, object]) -> list:
    for name in names or ():
        if name not in known:
            raise UserError(f"{flag}: there is no '{name}' here; known are {', '.join(known)}")
    return [known[name] for name in names or known]


if __name__ == "__main__":
    sys.exit(run_command(main))
