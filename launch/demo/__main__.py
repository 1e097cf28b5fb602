"""One command from real clips to generated video: runs every stage of the demo.

python -m launch.demo
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.demo.display import Display
from launch.demo.results import Goal, read_goals
from launch.demo.runner import Runner, StageError, command_text, log_tail
from launch.demo.stages import DEFAULT_OUTPUT, Stage, count_accelerators, demo_stages
from megatron_nuwa.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_args(arguments)
    console = Console(soft_wrap=True)
    output = _relative(options.output)
    os.chdir(ROOT)
    # A demo that is told to end must end the processes of its stage too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    stages = demo_stages(output, count_accelerators())
    if options.list:
        _list(console, stages)
        return 0
    stages = _until(stages, options.until)
    try:
        with Display(Console(), log_tail) as display:
            Runner(output, display).run(stages)
    except StageError as failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return 1
    if stages[-1].name == "report":
        _close(console, output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.demo",
        description="Run the whole chain on real clips: media, VQ-GAN, token corpus, pretraining, "
        "resume, generation, report. Stages that are done are not done again.",
        epilog="example: python -m launch.demo --until tokenize",
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--list", action="store_true", help="show the stages and their commands")
    return parser


def _relative(output: Path) -> Path:
    """The output folder as seen from the repository's root, where all commands run."""
    absolute = output.absolute()
    return absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute


def _until(stages: list[Stage], name: str | None) -> list[Stage]:
    if name is None:
        return stages
    names = [stage.name for stage in stages]
    if name not in names:
        raise UserError(f"--until {name} is not a stage; stages are: {', '.join(names)}")
    return stages[: names.index(name) + 1]


def _list(console: Console, stages: Sequence[Stage]) -> None:
    for stage in stages:
        console.print(f"{stage.name}: {stage.title}", style="bold", highlight=False)
        for command in stage.commands:
            text = command_text(command, stage.environment)
            console.print(f"  {text}", markup=False, highlight=False)


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
