"""The arguments of commands: what is refused, in which words, and what a check leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nuwa.command_line import (
    CommandParser,
    example_in,
    number,
    output_file,
    output_folder,
    whole_number,
)
from megatron_nuwa.errors import UserError


@pytest.fixture
def parser() -> CommandParser:
    parser = CommandParser(prog="python -m it", description="It.", example="python -m it --n 1")
    parser.add_argument("--plain", type=int)
    parser.add_argument("--share", type=float)
    parser.add_argument("--n", type=whole_number(1))
    parser.add_argument("--some", type=whole_number(2, 5))
    parser.add_argument("--seconds", type=number(above=0))
    parser.add_argument("--part", type=number(least=0, most=1))
    parser.add_argument("--output", type=output_file)
    parser.add_argument("--folder", type=output_folder)
    parser.add_argument("--fps", type=float, dest="frames_per_second")
    return parser


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--plain", "x"], "--plain must be a whole number, not x"),
        (["--plain", "1.5"], "--plain must be a whole number, not 1.5"),
        (["--share", "half"], "--share must be a number, not half"),
        (["--share", "nan"], "--share must be a number, not nan"),
        (["--n", "0"], "--n must be a whole number of at least 1, not 0"),
        (["--n", "-3"], "--n must be a whole number of at least 1, not -3"),
        (["--some", "6"], "--some must be a whole number from 2 to 5, not 6"),
        (["--seconds", "0"], "--seconds must be a number above 0, not 0"),
        (["--seconds", "inf"], "--seconds must be a number above 0, not inf"),
        (["--part", "1.1"], "--part must be a number from 0 to 1, not 1.1"),
        (["--nonsense"], "unrecognized arguments: --nonsense (see python -m it --help)"),
    ],
)
def test_a_wrong_argument_is_one_sentence_that_names_it(
    parser: CommandParser, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        parser.parse_args(arguments)
    assert str(caught.value) == sentence


def test_an_output_is_tried_before_the_work_and_without_a_trace(
    parser: CommandParser, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for flag, path, sentence in (
        ("--output", tmp_path, f"--output must be a file, not the folder {tmp_path}"),
        ("--output", tmp_path / "file/a.json", "must be where one can write, not "),
        ("--folder", tmp_path / "absent", "--folder must be an existing folder, not "),
    ):
        with pytest.raises(UserError) as caught:
            parser.parse_args([flag, str(path)])
        assert sentence in str(caught.value)
    good = parser.parse_args(["--output", str(tmp_path / "new/a.json"), "--folder", str(tmp_path)])
    assert good.output == tmp_path / "new/a.json"
    assert good.folder == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_flags_are_named_as_the_user_writes_them(parser: CommandParser) -> None:
    assert parser.flags()["frames_per_second"] == "--fps"


def test_help_ends_with_the_docstrings_example(parser: CommandParser) -> None:
    assert parser.format_help().endswith("example:\n\npython -m it --n 1\n")
    for doc in ("It does.\n\nExample:\n\na b\n", "It does. Examples, on two nodes:\n\na b\n"):
        assert example_in(doc) == "a b"
