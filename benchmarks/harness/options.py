"""Kinds of command-line values, and options that several benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def positive(text: str) -> int:
    """A count from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def add_recipe(parser: argparse.ArgumentParser, *, overrides: bool = True) -> None:
    """`--recipe`, the 870 M where it is left out, and the fields of it to change."""
    parser.add_argument(
        "--recipe",
        type=Path,
        default=ROOT / "launch/recipes/nuwa_870m.yaml",
        help="whose model (default: the 870 M)",
    )
    if overrides:
        parser.add_argument(
            "overrides", metavar="key=value", nargs="*", help="fields of the recipe to change"
        )
