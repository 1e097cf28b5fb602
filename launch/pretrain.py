"""Pretrain NÜWA. Example, two processes on one machine:

deepspeed --num_accelerators 2 launch/pretrain.py launch/recipes/demo.yaml schedule.steps=100
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_nuwa.errors import UserError
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.stopping import StopSignals


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="deepspeed [launcher options] launch/pretrain.py",
        description="Pretrain NÜWA on token corpora; continues from the run's newest checkpoint.",
        epilog=f"example:{__doc__.split(':', 1)[1]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="YAML file, such as launch/recipes/demo.yaml"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="fields to change, such as run=runs/mine"
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="FILE",
        help="DeepSpeed layout (default: the recipe's training.deepspeed_config)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
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
