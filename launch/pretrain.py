"""Pretrain NÜWA. Example, two processes on one machine:

deepspeed --num_accelerators 2 launch/pretrain.py launch/recipes/demo.yaml schedule.steps=100
"""

from __future__ import annotations

import argparse

from megatron_nuwa.command_line import (
    CommandParser,
    add_layout,
    add_local_rank,
    add_recipe,
    example_in,
)
from megatron_nuwa.errors import UserError
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.stopping import StopSignals


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="deepspeed [launcher options] launch/pretrain.py",
        description="Pretrain NÜWA on token corpora; continues from the run's newest checkpoint.",
        example=example_in(__doc__),
    )
    add_recipe(parser)
    add_layout(parser)
    add_local_rank(parser)
    return parser.parse_intermixed_args()


def main() -> None:
    """Run one process of the pretraining; a stop signal at any time ends it in order."""
    with StopSignals() as stop:
        _pretrain(parse_arguments(), stop)


def _pretrain(arguments: argparse.Namespace, stop: StopSignals) -> None:
    # Here, because importing them takes seconds, in which signals are taken already.
    from megatron_nuwa.generation.show import make_sample_shower
    from megatron_nuwa.plan.needs import memory_needed
    from megatron_nuwa.training.pretrain import pretrain
    from megatron_nuwa.training.processes import join_processes
    from megatron_nuwa.training.recipe import TrainingSettings, load_recipe
    from megatron_nuwa.training.watchdog import backend_timeout

    try:
        training = load_recipe(arguments.recipe, arguments.overrides).training
    except UserError:
        # It is told once, when the processes have met.
        training = TrainingSettings()
    with join_processes(timeout=backend_timeout(training.hang_seconds)) as processes:
        recipe = processes.first_then_all(
            lambda: load_recipe(arguments.recipe, arguments.overrides)
        )
        layout = arguments.deepspeed_config or recipe.training.deepspeed_config
        needed = memory_needed(recipe, processes.device.type)
        shower = make_sample_shower(recipe)
        pretrain(recipe, layout, processes, shower, needed, stop)


if __name__ == "__main__":
    run_process(main)
