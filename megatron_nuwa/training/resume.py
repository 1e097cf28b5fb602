"""Where a run continues, and whether it may."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import fingerprint
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.training import checkpoint as checkpoints
from megatron_nuwa.training.checkpoint import Checkpoints
from megatron_nuwa.training.inputs import Inputs
from megatron_nuwa.training.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """The checkpoint to load (None: from scratch), its step, and what to tell the user.

    `layout` wrote the checkpoint if that was another layout than the run has now, else None.
    """

    checkpoint: Path | None
    step: int
    messages: tuple[str, ...]
    layout: Layout | None = None


# A run's newest whole checkpoint, and a sentence for each newer one that is damaged.
Newest = tuple[Path | None, list[str]]


def find_newest(recipe: Recipe) -> Newest:
    """Look for the run's newest whole checkpoint; reads all of its files.

    Raises `UserError` that names the first file that this user may not read.
    """
    assert recipe.run is not None
    try:
        return Checkpoints(recipe.run / "checkpoints", recipe.training.keep_checkpoints).newest()
    except PermissionError as error:
        raise UserError(
            f"checkpoint file {error.filename} cannot be read: {error.strerror}; let this user "
            "read it, or choose another run folder with run=FOLDER"
        ) from error


def find_start(recipe: Recipe, description: dict[str, Any], found: Newest) -> Start:
    """Where the run that `description` describes continues from what `find_newest` found.

    The layout may have changed. Raises `UserError` that names the first field in which the run
    differs from the recipe.
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
    fixed = {key: value for key, value in description.items() if key != "layout"}
    difference = _first_difference(state, fixed)
    if difference is not None:
        raise UserError(
            f"run {recipe.run} was trained with {_told(*difference)} to continue the run, or "
            f"begin another with its weights: run=FOLDER start.weights={recipe.run}"
        )
    other = _other_layout(state, description)
    return Start(newest, int(state["step"]), tuple(complaints), other)


def _other_layout(state: dict[str, Any], description: dict[str, Any]) -> Layout | None:
    """The layout that wrote a checkpoint whose state must be taken over; None for the same."""
    if state["layout"] == description["layout"]:
        return None
    return layout_of(state["layout"])


def describe(
    recipe: Recipe, layout: Layout, config: dict[str, Any], inputs: Inputs
) -> dict[str, Any]:
    """What a checkpoint says of its run: all but `layout` must stay for the run to continue.

    How batches are cut into micro-batches is not among it: it depends on the memory at hand.
    """
    assert recipe.model is not None
    assert recipe.data is not None
    return {
        "layout": {**asdict(layout), "deepspeed_config": config},
        "precision": layout.precision,
        "seed": recipe.seed,
        "model": recipe.model.description(),
        "tokenizers": {
            "vqgan": fingerprint(inputs.vqgan),
            "bpe": inputs.bpe.fingerprint,
            **(
                {}
                if inputs.sketch_vqgan is None
                else {"sketch_vqgan": fingerprint(inputs.sketch_vqgan)}
            ),
        },
        "data": {
            "shuffle_window": recipe.data.shuffle_window,
            "caption_dropout": recipe.data.caption_dropout,
            "tasks": {
                task: {
                    "corpora": [corpus.manifest.fingerprint() for corpus in inputs.train[task]],
                    "grid": list(inputs.train[task][0].grid),
                    "frames_per_second": inputs.train[task][0].manifest.frames_per_second,
                    "corpus_weights": settings.corpus_weights,
                    "batch_size": settings.batch_size,
                    "weight": settings.weight,
                }
                for task, settings in recipe.data.tasks.items()
            },
        },
        "optimizer": recipe.optimizer.model_dump(mode="json", exclude={"implementation"}),
    }


def layout_of(description: dict[str, Any]) -> Layout:
    """The layout in a checkpoint's or a run's description."""
    return Layout(**{field.name: description[field.name] for field in fields(Layout)})


def _first_difference(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    # A checkpoint says more than a recipe at the top, but in no group below it.
    for key in {**now, **before} if prefix else now:
        old, value, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(old, dict):
            inner = _first_difference(old, value, f"{name}.")
            if inner is not None:
                return inner
        elif old != value:
            return name, old, value
    return None


def _told(field: str, before: Any, now: Any) -> str:
    """A difference in words, and what to do about it."""
    if field.startswith("tokenizers."):
        return f"another {field} than the recipe's; name that one"
    if field.endswith(".corpora"):
        return f"{field} that held other items than the recipe's do now; name those"
    if field.startswith("data.tasks.") and isinstance(before, dict):
        return f"{field}, which the recipe leaves out; add it"
    if field.startswith("data.tasks.") and isinstance(now, dict):
        return f"no {field}, which the recipe has; leave it out"
    return f"{field} = {before}, but now it is {now}; set it back"
