"""docs/paper.md names fields that recipes have, and values that they take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import yaml
from helpers import ROOT, run_command_line
from pydantic import BaseModel, TypeAdapter

from megatron_nuwa.training.recipe import Recipe, load_recipe

TEXT = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
SECTIONS = tuple(f"{name}." for name in Recipe.model_fields)
QUOTED = [each for each in re.findall(r"`([^`]+)`", TEXT) if each.startswith(SECTIONS)]


def classes_in(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from classes_in(part)


def value_in_recipe(path: str) -> Any:
    """What the recipes of the paper's sizes say."""
    name = "vqgan_f16" if path.startswith("vqgan.") else "nuwa_870m"
    value: Any = load_recipe(ROOT / f"launch/recipes/{name}.yaml")
    for part in path.split("."):
        value = getattr(value, part)
    return value


def field_of(path: str) -> Any:
    """The field that a dotted path leads to; `*` stands for any key."""
    settings: Any = Recipe
    names = [name for name in path.split(".") if name != "*"]
    for name in names[:-1]:
        settings = next(classes_in(settings.model_fields[name].annotation))
    return settings.model_fields[names[-1]]


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_field_exists_and_takes_the_value(quoted: str) -> None:
    path, colon, value = quoted.partition(": ")
    field = field_of(path)
    if colon:
        other = TypeAdapter(field.annotation).validate_python(yaml.safe_load(value))
        assert other != value_in_recipe(path), "what is called another reading is what is done"


def test_fields_are_named_at_all() -> None:
    assert len(QUOTED) > 40


@pytest.mark.parametrize(
    ("flag", "command"),
    [
        ("--short-clips", ["-m", "preprocessing", "tokenize", "--help"]),
        ("--best-of", ["launch/generate.py", "t2i", "--help"]),
        ("--guidance", ["launch/generate.py", "t2i", "--help"]),
        ("--top-k", ["launch/generate.py", "t2i", "--help"]),
        ("--top-p", ["launch/generate.py", "t2i", "--help"]),
    ],
)
def test_a_flag_exists(flag: str, command: list[str]) -> None:
    assert flag in TEXT
    done = run_command_line("python", *command)
    assert flag in done.stdout
