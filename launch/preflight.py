"""Check the nodes of a run without training. Example, two nodes:

deepspeed --hostfile HOSTFILE launch/preflight.py RECIPE --deepspeed_config ds_configs/zero1_bf16.json
"""  # noqa: E501

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from megatron_nuwa.command_line import (
    CommandParser,
    add_layout,
    add_local_rank,
    add_recipe,
    example_in,
    number,
)
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.preflight import Findings, examine
from megatron_nuwa.training.preparing import read_whole_layout
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.recipe import load_recipe

_LOG_WIDTH = 120


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="deepspeed [launcher options] launch/preflight.py",
        description="Check versions, kernels, folders, corpora, memory and speed of all nodes.",
        example=example_in(__doc__),
    )
    add_recipe(parser)
    add_layout(parser)
    parser.add_argument(
        "--gib_needed",
        type=number(above=0),
        metavar="GIB",
        help="memory that one process needs on its device (default: not checked)",
    )
    add_local_rank(parser)
    return parser.parse_intermixed_args()


def findings_table(findings: Findings) -> Table:
    """One row a process."""
    table = Table(title="processes of the run")
    for column in ("rank", "host", "device", "versions", "matmul TFLOP/s", "all-reduce GB/s"):
        table.add_column(column, justify="left" if column in ("host", "device") else "right")
    for report in findings.reports:
        speeds = findings.speeds
        table.add_row(
            str(report.rank),
            report.host,
            report.device,
            "  ".join(f"{name} {version}" for name, version in report.versions.items()),
            f"{speeds.matmul[report.rank] / 1e12:.3g}" if speeds else "",
            f"{speeds.all_reduce[report.rank] / 1e9:.3g}" if speeds else "",
        )
    return table


def show(findings: Findings, layout: Layout) -> None:
    """Print the table, the warnings and the verdict; the first problem is told as the error."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_LOG_WIDTH)
    console.print(findings_table(findings))
    for warning in findings.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    for problem in findings.problems[1:]:
        console.print(f"also: {problem}", style="red", markup=False, highlight=False)
    if not findings.problems:
        hosts = len({report.host for report in findings.reports})
        console.print(
            f"ready: {layout.name}, {layout.world_size} processes on {hosts} "
            f"{'node' if hosts == 1 else 'nodes'}",
            style="green",
            highlight=False,
        )


def main() -> None:
    """Run one process of the preflight."""
    arguments = parse_arguments()
    with join_processes() as processes:
        recipe = processes.first_then_all(
            lambda: load_recipe(arguments.recipe, arguments.overrides)
        )
        path = arguments.deepspeed_config or recipe.training.deepspeed_config
        layout, _ = read_whole_layout(recipe, path, processes)
        needed = None if arguments.gib_needed is None else int(arguments.gib_needed * 2**30)
        findings = examine(recipe, layout, processes, bytes_needed=needed, measure_alone=True)
        if processes.is_first:
            show(findings, layout)
        processes.raise_first(findings.problems[0] if findings.problems else None)


if __name__ == "__main__":
    run_process(main)
