"""What a run will need and how long it will take. Example:

python -m megatron_nuwa.plan launch/recipes/nuwa_870m.yaml --gpus 64 --device a100-80gb
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.parallel.layout import read_layout
from megatron_nuwa.plan.candidates import Machine, all_candidates, judge_chosen
from megatron_nuwa.plan.devices import DEVICES, device_named
from megatron_nuwa.plan.report import as_json, show
from megatron_nuwa.training.recipe import load_recipe

_WIDTH = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_intermixed_args(arguments)
    for name in ("gpus", "gpus_per_node", "rows"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be at least 1, not {getattr(options, name)}")
    machine = Machine(device_named(options.device), options.gpus, options.gpus_per_node)
    recipe = load_recipe(options.recipe, options.overrides)
    recipe.require("model", "data")
    settings, deepspeed = read_layout(options.deepspeed_config or recipe.training.deepspeed_config)
    chosen = judge_chosen(recipe, settings, deepspeed, machine)
    candidates = all_candidates(recipe, settings, deepspeed, machine)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    show(console, recipe, machine, chosen, candidates, options.rows)
    if options.json is not None:
        report = as_json(recipe, machine, chosen, candidates)
        try:
            write_text_atomically(options.json, json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"--json {options.json} cannot be written: {error.strerror}; name a file"
            ) from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_nuwa.plan",
        description="Parameters, FLOPs, memory, communication and time of a run, for its layout "
        "and for every other layout of as many processes.",
        epilog=f"example:{__doc__.split(':', 1)[1] if __doc__ else ''}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="YAML file, such as launch/recipes/nuwa_870m.yaml"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="fields to change, such as schedule.steps=1000",
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="processes in all")
    parser.add_argument(
        "--device", required=True, metavar="NAME", help=f"one of {', '.join(DEVICES)}"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="processes a node (default: 8)"
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="FILE",
        help="layout file (default: the recipe's training.deepspeed_config)",
    )
    parser.add_argument(
        "--rows", type=int, default=12, metavar="N", help="layouts a table (default: 12)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
