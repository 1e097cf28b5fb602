"""Where a run continues, and whether it may."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import fingerprint
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.training import checkpoint as checkpoints
from megatron_nuwa.training.checkpoint import Checkpoints
from megatron_nuwa.training.inputs import Inputs
from megatron_nuwa.training.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """The checkpoint to load (None: from scratch), its step, and what to tell the user."""

    checkpoint: Path | None
    step: int
    messages: tuple[str, ...]


# A run's newest whole checkpoint, and a sentence for each newer one that is damaged.
Newest = tuple[Path | None, list[str]]


def find_newest(recipe: Recipe) -> Newest:
    """Look for the run's newest whole checkpoint; reads all of its files."""
    assert recipe.run is not None
    return Checkpoints(recipe.run / "checkpoints", recipe.training.keep_checkpoints).newest()


def find_start(recipe: Recipe, description: dict[str, Any], found: Newest) -> Start:
    """Where the run that `description` describes continues from what `find_newest` found.

    Raises `UserError` that names the first field in which the run differs from the recipe, the
    layout or the number of processes at hand.
    """
    assert recipe.run is not None
    newest, complaints = found
    if newest is None:
        if complaints:
            raise UserError(
                f"{complaints[-1].removesuffix('; using the one before')}, and {recipe.run} has "
                "no other; restore its files or choose another run folder with run=FOLDER"
            )
        return Start(None, 0, ())
    state = checkpoints.read_state(newest)
    difference = _first_difference(state, description)
    if difference is not None:
        field, before, now = difference
        raise UserError(
            f"run {recipe.run} was trained with {field} = {before}, but now it is {now}; set it "
            "back to continue the run, or choose another run folder with run=FOLDER"
        )
    return Start(newest, int(state["step"]), tuple(complaints))


def describe(
    recipe: Recipe, layout: Layout, config: dict[str, Any], inputs: Inputs
) -> dict[str, Any]:
    """What must be the same for a run to continue exactly."""
    assert recipe.model is not None
    assert recipe.data is not None
    return {
        "seed": recipe.seed,
        "processes": layout.world_size,
        "parallel": {
            "pipeline": layout.pipeline,
            "tensor": layout.tensor,
            "sequence_parallel": layout.sequence_parallel,
            "cut": layout.cut,
        },
        "deepspeed_config": config,
        "model": recipe.model.model_dump(mode="json"),
        "data": {
            "accumulation": recipe.data.accumulation,
            "micro_batch_tokens": recipe.data.micro_batch_tokens,
            "shuffle_window": recipe.data.shuffle_window,
            "caption_dropout": recipe.data.caption_dropout,
            "corpus_weights": {task: s.corpus_weights for task, s in recipe.data.tasks.items()},
            "batch_sizes": {task: s.batch_size for task, s in recipe.data.tasks.items()},
            "grids": {task: list(corpora[0].grid) for task, corpora in inputs.train.items()},
            "frames_per_second": {
                task: corpora[0].manifest.frames_per_second
                for task, corpora in inputs.train.items()
            },
            "corpora": {
                task: [_fingerprint(c) for c in corpora] for task, corpora in inputs.train.items()
            },
            "items": {task: [len(c) for c in corpora] for task, corpora in inputs.train.items()},
        },
        "optimizer": recipe.optimizer.model_dump(mode="json", exclude={"implementation"}),
        "tokenizers": {"vqgan": fingerprint(inputs.vqgan), "bpe": inputs.bpe.fingerprint},
    }


def _fingerprint(corpus: Corpus) -> str:
    """Of what a corpus holds, wherever it lies."""
    return hashlib.sha256(corpus.manifest.model_dump_json().encode()).hexdigest()


def _first_difference(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    for key, value in now.items():
        old, name = before.get(key), f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(old, dict):
            inner = _first_difference(old, value, f"{name}.")
            if inner is not None:
                return inner
        elif old != value:
            return name, old, value
    return None
