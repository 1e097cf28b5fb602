"""The command lines of the benchmarks: their parser, and options that several of them share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from benchmarks.harness.report import file_stem
from megatron_nuwa.command_line import CommandParser, example_in, number, output_file, whole_number
from megatron_nuwa.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
# Where the loader, the farm and small tokenizers run on every machine.
CPU = torch.device("cpu")
# The 870 M recipe at a size of seconds.
SMALL = (
    "model.width=64",
    "model.heads=4",
    "model.encoder_layers=2",
    "model.decoder_layers=3",
    "model.codebook_size=96",
    "model.code_dim=16",
    "model.text_vocabulary=128",
    "model.position_grid=[6,6,4]",
)

positive = whole_number(1)


def benchmark_parser(name: str, doc: str | None) -> CommandParser:
    """The parser of `python -m benchmarks.NAME`; what it says of itself is its docstring."""
    about = re.split(r"\s*\bExamples?\b", doc or "", maxsplit=1)[0]
    return CommandParser(
        prog=f"python -m benchmarks.{name}", description=about, example=example_in(doc)
    )


def add_output(parser: CommandParser, device: torch.device | None = None) -> None:
    """`--output`, a JSON file or a folder for one; tried before anything is measured."""
    if device is None:
        device = torch.device("cuda") if torch.cuda.is_available() else CPU
    own = f"{parser.prog.rpartition('.')[2]}_{file_stem(device)}.json"

    def report(text: str) -> Path:
        path = Path(text)
        return output_file(str(path if path.suffix == ".json" else path / own))

    parser.add_argument(
        "--output", type=report, metavar="PATH", help=f"JSON to write, or a folder for {own}"
    )


def add_limit(parser: argparse.ArgumentParser, share: float, where: str) -> None:
    """`--limit`, above which the benchmark's exit code is 1."""
    parser.add_argument(
        "--limit",
        type=number(least=0),
        default=share,
        metavar="SHARE",
        help=f"exit with 1 above this share {where} (default: {share})",
    )


def add_recipe(
    parser: argparse.ArgumentParser,
    recipe: str = "nuwa_870m",
    whose: str = "model",
    *,
    overrides: bool = False,
) -> None:
    """`--recipe`, and with `overrides` the fields of it to change (`parse_intermixed_args`)."""
    parser.add_argument(
        "--recipe",
        type=Path,
        default=ROOT / f"launch/recipes/{recipe}.yaml",
        metavar="FILE",
        help=f"whose {whose} (default: {recipe})",
    )
    if overrides:
        parser.add_argument(
            "overrides",
            metavar="key=value",
            nargs="*",
            default=[],
            help="fields of the recipe to change",
        )


def add_real_step(parser: argparse.ArgumentParser, layout: str | None = None) -> None:
    """The recipe of a real step, its layout (of `ds_configs`, or the benchmark's own), a trial."""
    add_recipe(parser, overrides=True)
    parser.add_argument(
        "--layout",
        type=Path,
        default=None if layout is None else ROOT / f"ds_configs/{layout}.json",
        metavar="FILE",
        help=f"DeepSpeed layout (default: {layout or 'all of the state in bf16'})",
    )
    parser.add_argument("--dry-run", action="store_true", help="a small model, for a trial")


def real_recipe(options: argparse.Namespace) -> Recipe:
    """What `add_real_step` was told; `UserError` for a recipe without a model or data."""
    small = SMALL if options.dry_run else ()
    recipe = load_recipe(options.recipe, [*small, *options.overrides])
    recipe.require("model", "data")
    return recipe
