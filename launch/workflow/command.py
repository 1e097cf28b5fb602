"""What the commands that run stages share: their options, their listing, their end."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from launch.workflow.display import Display
from launch.workflow.runner import Runner, StageError, command_text, log_tail
from launch.workflow.stage import Stage
from megatron_nuwa.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
_END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that runs stages, but for its output folder."""
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--list", action="store_true", help="show the stages and their commands")


def run_stages(
    options: argparse.Namespace,
    output: Path,
    plan: Callable[[Path], list[Stage]],
    close: Callable[[Console, Path], None],
) -> int:
    """Run the stages that `plan` makes for a folder, or list them; returns the exit code.

    Commands run in the repository's root; `close` is called when the last stage is done.
    """
    console = Console(soft_wrap=True)
    output = _relative(output)
    os.chdir(ROOT)
    _end_in_order()
    every = plan(output)
    if options.list:
        _list(console, every)
        return 0
    stages = _until(every, options.until)
    try:
        with Display(Console(), log_tail) as display:
            Runner(output, display).run(stages)
    except StageError as failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return 1
    if len(stages) == len(every):
        close(console, output)
    return 0


def _end_in_order() -> None:
    """Have a signal to end also end the stage, whose processes get none from the terminal."""
    # nohup has SIGHUP ignored.
    heeded = [number for number in _END_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]

    def end(number: int, _: FrameType | None) -> None:
        # The kernel and the shell both tell of a closed terminal: one must not interrupt the end
        # that the other began.
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in heeded:
        signal.signal(number, end)


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
