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
from megatron_nuwa.generation.show import make_sample_shower
from megatron_nuwa.plan.needs import memory_needed
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.recipe import load_recipe


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
    """Run one process of the pretraining."""
    arguments = parse_arguments()
    with join_processes() as processes:
        recipe = processes.first_then_all(
            lambda: load_recipe(arguments.recipe, arguments.overrides)
        )
        layout = arguments.deepspeed_config or recipe.training.deepspeed_config
        needed = memory_needed(recipe, processes.device.type)
        pretrain(recipe, layout, processes, make_sample_shower(recipe), needed)


if __name__ == "__main__":
    run_process(main)
