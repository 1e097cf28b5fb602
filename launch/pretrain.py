"""Pretrain NÜWA. Example, two processes on one machine:

deepspeed --num_accelerators 2 launch/pretrain.py launch/recipes/demo.yaml schedule.steps=100
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_nuwa.generation.show import make_sample_shower
from megatron_nuwa.plan.needs import memory_needed
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.recipe import load_recipe


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
