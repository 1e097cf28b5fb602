"""What a launcher's command trains: which run, to which step, with how many processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from megatron_nuwa.errors import UserError
from megatron_nuwa.training.nodes import WhyNot, why_not_with
from megatron_nuwa.training.recipe import Recipe, load_recipe
from megatron_nuwa.training.vqgan_recipe import VqganRecipe

_PRETRAIN, _TRAIN_VQGAN = "pretrain.py", "train_vqgan.py"
_SCRIPTS = (_PRETRAIN, _TRAIN_VQGAN)
_LAYOUT, _SECTION = "--deepspeed_config", "--section"


@dataclass(frozen=True)
class SupervisedRun:
    """A run's folder, the step that it ends with, and why so many processes cannot train it."""

    folder: Path
    last_step: int
    why_not: WhyNot


def run_of(command: Sequence[str]) -> SupervisedRun | None:
    """The run of a command that pretrains or trains a VQ-GAN; None for others.

    Raises `UserError` where its recipe cannot be read.
    """
    place = next((n for n, word in enumerate(command) if Path(word).name in _SCRIPTS), None)
    if place is None:
        return None
    script = Path(command[place]).name
    words = [
        word
        for before, word in pairwise(command[place:])
        if not word.startswith("-") and before not in (_LAYOUT, _SECTION)
    ]
    recipes = [word for word in words if "=" not in word]
    if not recipes:
        raise UserError(f"{script} is given no recipe; example: {script} launch/recipes/demo.yaml")
    recipe = load_recipe(recipes[0], [word for word in words if "=" in word])
    if script == _TRAIN_VQGAN:
        return _vqgan_run(recipe, _value(command, _SECTION) or "vqgan")
    return _pretraining_run(recipe, _value(command, _LAYOUT))


def training_processes(launcher: int) -> list[psutil.Process]:
    """The run's processes on this node: those that the launcher started, or the launcher itself."""
    found = []
    try:
        first = psutil.Process(launcher)
        processes = [first, *first.children(recursive=True)]
    except psutil.Error:
        return []
    for process in processes:
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        script = next((word for word in words[1:] if not word.startswith("-")), "")
        if words and "python" in Path(words[0]).name and Path(script).name in _SCRIPTS:
            found.append(process)
    return found


def _pretraining_run(recipe: Recipe, layout: str | None) -> SupervisedRun | None:
    if recipe.run is None:
        return None
    last = min(recipe.schedule.steps, recipe.training.stop_at_step or recipe.schedule.steps)
    layout_file = Path(layout) if layout else recipe.training.deepspeed_config
    return SupervisedRun(recipe.run, last, why_not_with(recipe, layout_file))


def _vqgan_run(recipe: Recipe, section: str) -> SupervisedRun | None:
    settings = getattr(recipe, section, None)
    # The command itself says what is wrong with its section.
    if not isinstance(settings, VqganRecipe):
        return None

    def why_not(processes: int) -> str | None:
        if settings.batch_size % processes == 0:
            return None
        return f"{section}.batch_size {settings.batch_size} does not divide by {processes}"

    return SupervisedRun(settings.run, settings.steps, why_not)


def _value(command: Sequence[str], option: str) -> str | None:
    for before, word in pairwise([*command, ""]):
        if before == option:
            return word
        if before.startswith(f"{option}="):
            return before.split("=", maxsplit=1)[1]
    return None
