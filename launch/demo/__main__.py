"""One command from real clips to generated video: runs every stage of the demo.

python -m launch.demo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.demo.results import Goal, read_goals
from launch.demo.stages import DEFAULT_OUTPUT, demo_stages
from launch.workflow.command import add_stage_arguments, run_stages
from launch.workflow.stage import count_accelerators
from megatron_nuwa.command_line import CommandParser
from megatron_nuwa.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_args(arguments)
    accelerators = count_accelerators()
    return run_stages(
        options, options.output, lambda output: demo_stages(output, accelerators), _close
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m launch.demo",
        description="Run the whole chain on real clips: media, VQ-GAN, token corpus, pretraining, "
        "resume, generation, report. Stages that are done are not done again.",
        example="python -m launch.demo --until tokenize",
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)"
    )
    add_stage_arguments(parser)
    return parser


def _close(console: Console, output: Path) -> None:
    console.print()
    for goal in read_goals(output):
        console.print(_goal_line(goal), highlight=False)
    console.print(f"\nThe page:    {output / 'report.html'}", highlight=False)
    tensorboard = f"{Path(sys.executable).parent / 'tensorboard'} --logdir {output}"
    console.print(f"TensorBoard: {tensorboard}", highlight=False)


def _goal_line(goal: Goal) -> str:
    mark = "[green]✓[/]" if goal.met else "[red]✗[/]"
    return f"{mark} {goal.name}: {goal.value} (goal: {goal.goal})"


if __name__ == "__main__":
    sys.exit(run_command(main))
