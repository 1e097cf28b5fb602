"""Show what a training step spends outside the model: data, schedule, guard, logging. Example:

OMP_NUM_THREADS=1 python -m benchmarks.step_overhead --steps 40
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.corpora import make_inputs
from benchmarks.harness.options import (
    ROOT,
    add_limit,
    add_output,
    add_recipe,
    benchmark_parser,
    positive,
)
from benchmarks.harness.report import device_name, write_json
from megatron_nuwa.data.batches import TaskBatches
from megatron_nuwa.errors import run_command
from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.training.figures import StepFigures
from megatron_nuwa.training.guard import Guard
from megatron_nuwa.training.monitor import Monitor
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.recipe import Recipe, load_recipe

_ITEMS = 512
MODEL = "model: forward, backward, optimizer"
WAIT = "waiting for data"
GUARD = "mean losses and guard"
FIGURES = "figures, log and TensorBoard"
REST = "loop, schedule, moving batches"
READING = "reading batches, in a thread beside"
OUTSIDE = (WAIT, GUARD, FIGURES, REST)


@dataclass
class Clock:
    """Seconds by part of the step, each without the parts inside it, noted at every step's end."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    _inner: list[float] = field(default_factory=list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time on the main thread counted under a name."""

        @functools.wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                taken = time.perf_counter() - started
                self.seconds[name] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return wrapper

    def aside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its processor time on another thread counted as reading."""

        @functools.wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            started = time.thread_time()
            result = function(*arguments, **options)
            self.seconds[READING] += time.thread_time() - started
            return result

        return wrapper

    def waited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`add_wait`, which is told how long the loop has waited."""

        @functools.wraps(function)
        def wrapper(figures: StepFigures, seconds: float) -> None:
            self.seconds[WAIT] += seconds
            function(figures, seconds)

        return wrapper

    def ended(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`restart_clock`, which ends a step."""

        @functools.wraps(function)
        def wrapper(*arguments: Any) -> None:
            self.steps.append((time.perf_counter(), dict(self.seconds)))
            function(*arguments)

        return wrapper

    def means(self, count: int) -> dict[str, float]:
        """Mean seconds of the last `count` steps but the very last one, by part.

        All parts but the reading add up to the whole step.
        """
        (begun, before), (ended, after) = self.steps[-2 - count], self.steps[-2]
        means = {
            name: (after.get(name, 0.0) - before.get(name, 0.0)) / count
            for name in (MODEL, *OUTSIDE, READING)
        }
        whole = (ended - begun) / count
        means[REST] = whole - sum(means[name] for name in (MODEL, WAIT, GUARD, FIGURES))
        return means


@contextmanager
def _watching(clock: Clock) -> Iterator[None]:
    import_deepspeed()
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine

    watched: list[tuple[type, str, Callable[..., Any]]] = [
        (owner, method, functools.partial(clock.timed, name))
        for owner, methods, name in (
            (DeepSpeedEngine, ("forward", "backward", "step"), MODEL),
            (PipelineEngine, ("train_batch",), MODEL),
            (StepFigures, ("mean_losses",), GUARD),
            (Guard, ("verdict", "accepted"), GUARD),
            (StepFigures, ("add", "take", "line", "stragglers"), FIGURES),
            (Monitor, ("scalars",), FIGURES),
        )
        for method in methods
    ]
    watched += [
        (TaskBatches, "micro_batches", clock.aside),
        (StepFigures, "add_wait", clock.waited),
        (StepFigures, "restart_clock", clock.ended),
    ]
    with ExitStack() as patches:
        for owner, method, wrap in watched:
            wrapped = wrap(vars(owner)[method])
            patches.enter_context(patch.object(owner, method, wrapped))
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where the share outside the model is above the limit."""
    options = _parser().parse_args(arguments)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, join_processes() as processes:
        recipe = _recipe(options.recipe, Path(folder), options.steps)
        with _watching(clock):
            pretrain(recipe, ROOT / recipe.training.deepspeed_config, processes)
        device = processes.device
    means = clock.means(options.steps)
    whole = sum(means[name] for name in (MODEL, *OUTSIDE))
    outside = sum(means[name] for name in OUTSIDE) / whole
    _show(means, whole, outside, f"{recipe.name} recipe, {device_name(device)}")
    if options.output is not None:
        report = {
            "device": device_name(device),
            "torch": torch.__version__,
            "recipe": recipe.name,
            "steps": options.steps,
            "step_ms": whole * 1e3,
            "parts_ms": {name: seconds * 1e3 for name, seconds in means.items()},
            "outside_model": outside,
            "outside_model_and_reading": outside + means[READING] / whole,
        }
        write_json(options.output, report)
    return 0 if outside <= options.limit else 1


def _recipe(path: Path, folder: Path, timed_steps: int) -> Recipe:
    plain = load_recipe(path)
    inputs = make_inputs(folder, plain, _ITEMS)
    # Until the first log line tables are built and files opened; the last step saves the run.
    steps = plain.training.log_every + timed_steps + 1
    fixed = [f"run={folder / 'run'}", "evaluation=null", "samples=null", f"schedule.steps={steps}"]
    return load_recipe(path, [*inputs, *fixed, f"training.checkpoint_every={steps}"])


def _show(means: dict[str, float], whole: float, outside: float, title: str) -> None:
    table = Table(title=f"Where a training step's time goes · {title}")
    table.add_column("part")
    for column in ("ms a step", "share"):
        table.add_column(column, justify="right")
    for name in (MODEL, *OUTSIDE):
        table.add_row(name, f"{means[name] * 1e3:.2f}", f"{means[name] / whole:.2%}")
    table.add_section()
    table.add_row("whole step", f"{whole * 1e3:.2f}", "100%")
    table.add_row(READING, f"{means[READING] * 1e3:.2f}", f"{means[READING] / whole:.2%}")
    console = Console()
    console.print(table)
    console.print(
        f"outside the model: {outside:.2%} of a step, and with the reading, if none of it were "
        f"hidden, {outside + means[READING] / whole:.2%}",
        highlight=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("step_overhead", __doc__)
    add_recipe(parser, "demo", "model, batch sizes and log interval")
    parser.add_argument(
        "--steps", type=positive, default=40, metavar="N", help="timed steps (default: 40)"
    )
    add_limit(parser, 0.02, "outside the model")
    add_output(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
