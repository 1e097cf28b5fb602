"""The arguments of commands: a mistake is one sentence, and each `--help` ends with an example."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megatron_nuwa.errors import UserError

T = TypeVar("T", int, float)


class CommandParser(argparse.ArgumentParser):
    """The parser of one command; a wrong argument is a `UserError` that names it.

    `example` is shown under the help as it is; `example_in(__doc__)` takes it from a docstring.
    """

    def __init__(self, *, prog: str, description: str, example: str, **settings: Any) -> None:
        if "\n" not in description:
            width = shutil.get_terminal_size().columns - 2
            description = textwrap.fill(description, width, break_on_hyphens=False)
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n\n{example.strip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )
        # argparse's own words for a text that is no number are Python's.
        self.register("type", int, whole_number())
        self.register("type", float, number())

    def error(self, message: str) -> NoReturn:
        """As that of argparse, which would print the usage, too."""
        wrong_value = re.match(r"argument ([^:]+): (must .+)", message, re.DOTALL)
        if wrong_value:
            raise UserError(" ".join(wrong_value.groups()))
        raise UserError(f"{message} (see {self.prog} --help)")

    def flags(self) -> dict[str, str]:
        """How the user writes each argument, such as `--fps` for `frames_per_second`."""
        return {
            action.dest: action.option_strings[0] if action.option_strings else str(action.metavar)
            for action in self._actions
        }


def example_in(doc: str | None) -> str:
    """What follows 'Example:', or 'Examples, in words:', in a docstring."""
    return re.split(r"\bExamples?\b[^:]*:", doc or "", maxsplit=1)[-1].strip()


def add_recipe(
    parser: argparse.ArgumentParser, recipe: str = "demo.yaml", field: str = "run=runs/mine"
) -> None:
    """The recipe, and fields of it to change, which want `parse_intermixed_args`."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help=f"YAML file, such as launch/recipes/{recipe}"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help=f"fields to change, such as {field}",
    )


def add_layout(parser: argparse.ArgumentParser) -> None:
    """`--deepspeed_config`, under DeepSpeed's own name for it."""
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="FILE",
        help="DeepSpeed layout (default: the recipe's training.deepspeed_config)",
    )


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """What the deepspeed launcher passes; the environment says the same."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def whole_number(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number between two bounds."""
    return _checked(int, "a whole number", least, None, most)


def number(
    least: float | None = None, above: float | None = None, most: float | None = None
) -> Callable[[str], float]:
    """The `type` of an argument that is a finite number between bounds."""
    return _checked(float, "a number", least, above, most)


def output_file(text: str) -> Path:
    """The `type` of a file to write later: that it can be is found out now, without a trace."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, not the folder {text}")
    _try_to_write(path.parent, text)
    return path


def output_folder(text: str) -> Path:
    """The `type` of an existing folder to write in."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be an existing folder, not {text}")
    _try_to_write(path, text)
    return path


def _try_to_write(folder: Path, text: str) -> None:
    folder = folder.absolute()
    try:
        there = next(f for f in (folder, *folder.parents) if f.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"must be where one can write, not {text}: {error.strerror}"
        ) from error


def _checked(
    convert: Callable[[str], T], kind: str, least: T | None, above: T | None, most: T | None
) -> Callable[[str], T]:
    bounds = ((" of at least", least), (" above", above), (" of at most", most))
    wish = kind + " and".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
    if least is not None and most is not None:
        wish = f"{kind} from {least} to {most}"

    def parse(text: str) -> T:
        try:
            value = convert(text)
        except ValueError:
            value = None
        is_right = (
            value is not None
            and math.isfinite(value)
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
        )
        if value is None or not is_right:
            raise argparse.ArgumentTypeError(f"must be {wish}, not {text}")
        return value

    return parse
