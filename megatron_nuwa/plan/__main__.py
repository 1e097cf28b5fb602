"""What a run will need and how long it will take. Example:

python -m megatron_nuwa.plan launch/recipes/nuwa_870m.yaml --gpus 64 --device a100-80gb
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_nuwa.command_line import (
    CommandParser,
    add_layout,
    add_recipe,
    example_in,
    output_file,
    whole_number,
)
from megatron_nuwa.errors import run_command
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.parallel.deepspeed_config import check_deepspeed_config
from megatron_nuwa.parallel.layout import read_layout
from megatron_nuwa.plan.candidates import Machine, all_candidates, judge_chosen
from megatron_nuwa.plan.devices import DEVICES, device_named
from megatron_nuwa.plan.report import as_json, show
from megatron_nuwa.training.recipe import load_recipe

_WIDTH = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_intermixed_args(arguments)
    machine = Machine(device_named(options.device), options.gpus, options.gpus_per_node)
    recipe = load_recipe(options.recipe, options.overrides)
    recipe.require("model", "data")
    path = options.deepspeed_config or recipe.training.deepspeed_config
    settings, deepspeed = read_layout(path)
    check_deepspeed_config(deepspeed, f"DeepSpeed config {path}")
    chosen = judge_chosen(recipe, settings, deepspeed, machine)
    candidates = all_candidates(recipe, settings, deepspeed, machine)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    show(console, recipe, machine, chosen, candidates, options.rows)
    if options.json is not None:
        report = as_json(recipe, machine, chosen, candidates)
        write_text_atomically(options.json, json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m megatron_nuwa.plan",
        description="Parameters, FLOPs, memory, communication and time of a run, for its layout "
        "and for every other layout of as many processes.",
        example=example_in(__doc__),
    )
    add_recipe(parser, "nuwa_870m.yaml", "schedule.steps=1000")
    parser.add_argument(
        "--gpus", type=whole_number(1), required=True, metavar="N", help="processes in all"
    )
    parser.add_argument(
        "--device", required=True, metavar="NAME", help=f"one of {', '.join(DEVICES)}"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="processes a node (default: 8)",
    )
    add_layout(parser)
    parser.add_argument(
        "--rows",
        type=whole_number(1),
        default=12,
        metavar="N",
        help="layouts a table (default: 12)",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write all figures there, too"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
