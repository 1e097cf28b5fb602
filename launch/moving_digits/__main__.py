"""One command that trains a model on moving digits, samples from it and scores the samples.

python -m launch.moving_digits
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.moving_digits.results import read_goals, read_scores
from launch.moving_digits.scorer import table
from launch.moving_digits.sizes import SIZES
from launch.moving_digits.stages import digit_stages
from launch.workflow.command import add_stage_arguments, run_stages
from launch.workflow.stage import count_accelerators
from megatron_nuwa.command_line import CommandParser, whole_number
from megatron_nuwa.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_args(arguments)
    size = SIZES[options.size]
    accelerators = count_accelerators() if options.size == "gpu" else 0

    def close(console: Console, output: Path) -> None:
        console.print()
        console.print(table(read_scores(output)))
        for goal in read_goals(size, output):
            mark = "[green]✓[/]" if goal.met else "[red]✗[/]"
            console.print(f"{mark} {goal.name}: {goal.value} (goal: {goal.goal})", highlight=False)
        console.print(f"\nThe page: {output / 'report.html'}", highlight=False)

    return run_stages(
        options,
        options.output or size.output,
        lambda output: digit_stages(size, output, accelerators, options.seed),
        close,
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m launch.moving_digits",
        description="Show that pretraining learns: train on handwritten digits that move, generate "
        "clips for captions that were held out, and read which digit appears and how it moves. "
        "Stages that are done are not done again.",
        example="python -m launch.moving_digits --until tokenize",
    )
    parser.add_argument(
        "size",
        nargs="?",
        choices=tuple(SIZES),
        default="cpu",
        help="cpu: 20 minutes on two quiet cores (default); gpu: larger and longer",
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: the recipe's)")
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        help="of media, trainings and samples (default: %(default)s)",
    )
    add_stage_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
