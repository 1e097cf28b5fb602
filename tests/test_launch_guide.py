"""The guide of launch/README.md makes the corpora that its recipe reads, and makes them whole."""

from __future__ import annotations

import argparse
import re
import shlex

from helpers import ROOT

from megatron_nuwa.training.recipe import load_recipe
from preprocessing.command_line import parser

TEXT = (ROOT / "launch/README.md").read_text(encoding="utf-8")
GUIDE = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)[0]


def commands(name: str) -> list[argparse.Namespace]:
    """What the farm reads of the guide's commands of one kind."""
    lines = [line for line in GUIDE.splitlines() if f"python -m preprocessing {name} " in line]
    return [
        parser().parse_args(shlex.split(line.partition("python -m preprocessing ")[2]))
        for line in lines
    ]


def test_every_corpus_of_the_recipe_is_tokenized_and_split() -> None:
    recipe = load_recipe(ROOT / "launch/recipes/nuwa_870m.yaml")
    assert recipe.data is not None
    assert recipe.evaluation is not None
    trained = {corpus for task in recipe.data.tasks.values() for corpus in task.corpora}
    held_out = {corpus for corpora in recipe.evaluation.corpora.values() for corpus in corpora}
    splits = commands("split")
    assert {str(split.output_train) for split in splits} == trained
    assert {str(split.output_heldout) for split in splits} == held_out
    assert {split.corpus for split in splits} == {each.output for each in commands("tokenize")}


def test_clips_of_three_seconds_are_not_left_out() -> None:
    """They hold 8 frames at the recipe's 2.5 a second, and its grid has 10."""
    (moments,) = (each for each in commands("tokenize") if "moments" in str(each.output))
    assert (moments.frames, moments.frames_per_second) == (10, 2.5)
    assert moments.short_clips == "faster"
