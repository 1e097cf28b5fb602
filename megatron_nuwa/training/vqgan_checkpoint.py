"""Checkpoints of a VQ-GAN training: written whole, held against their manifest, found again.

`RUN/checkpoints/step_00001000/` holds `vqgan.safetensors` (the tokenizer), `weights.safetensors`
(the trained weights where the tokenizer is their average), `discriminator.safetensors`,
`trainer.pt` (optimizers, usage of the codes, the guard's account), `state.json` and
`manifest.json`; see `checkpoint.py` for how they become whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import file_content, load_vqgan
from megatron_nuwa.training.checkpoint import STATE_FILE, Checkpoints, read_state
from megatron_nuwa.training.snapshot import Part, Weights
from megatron_nuwa.training.vqgan_step import VqganStep

_TOKENIZER_FILE = "vqgan.safetensors"
_WEIGHTS_FILE = "weights.safetensors"
_DISCRIMINATOR_FILE = "discriminator.safetensors"
_TRAINER_FILE = "trainer.pt"


def save_checkpoint(checkpoints: Checkpoints, step: int, state: VqganStep) -> None:
    """Write a checkpoint of `step` finished steps. Called by the first process alone.

    Raises `OSError`, and then leaves all whole checkpoints as they are.
    """
    folder = checkpoints.begin(step)
    try:
        files = {part.name: part.write(folder) for part in _parts(step, state)}
        checkpoints.commit(step, files)
    except OSError:
        checkpoints.abandon()
        raise
    checkpoints.remove_retired()


def find_checkpoint(checkpoints: Checkpoints, section: str) -> Path | None:
    """The newest whole checkpoint; None without any. Called by the first process alone.

    Tells of each newer one that is damaged; raises `UserError` when all of them are.
    """
    newest, complaints = checkpoints.newest()
    if newest is None and complaints:
        raise UserError(
            f"{complaints[-1].removesuffix('; using the one before')}, and "
            f"{checkpoints.folder} has no other; restore its files or train into a new folder with "
            f"{section}.run=FOLDER"
        )
    for complaint in complaints:
        print(complaint, flush=True)
    return newest


def load_checkpoint(folder: Path, state: VqganStep) -> int:
    """Take up a whole checkpoint; returns the number of finished steps.

    Raises `UserError` when it belongs to another recipe.
    """
    section = state.recipe.section
    tokenizer = load_vqgan(folder / _TOKENIZER_FILE)
    if tokenizer.config != state.model.config:
        raise UserError(
            f"{folder} holds a VQ-GAN with other settings than the recipe's {section}.model; train "
            f"into a new folder with {section}.run=FOLDER"
        )
    is_average = (folder / _WEIGHTS_FILE).is_file()
    weights = load_file(folder / _WEIGHTS_FILE) if is_average else tokenizer.state_dict()
    trainer = torch.load(folder / _TRAINER_FILE, map_location="cpu", weights_only=True)
    has_discriminator = (folder / _DISCRIMINATOR_FILE).is_file()
    if has_discriminator != (state.discriminator is not None):
        raise UserError(
            f"{folder} was trained {'with' if has_discriminator else 'without'} a discriminator; "
            f"keep {section}.loss.adversarial_weight on its side of 0 or train into a new folder "
            f"with {section}.run=FOLDER"
        )
    try:
        state.model.load_state_dict(weights)
        if state.discriminator:
            discriminator = load_file(folder / _DISCRIMINATOR_FILE)
            state.discriminator.load_state_dict(discriminator)
        state.load_state(trainer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} belongs to another recipe, with another discriminator or optimizer; take "
            f"that recipe or train into a new folder with {section}.run=FOLDER"
        ) from error
    if state.average and is_average:
        state.average.model.load_state_dict(tokenizer.state_dict())
    elif state.average:
        state.average.begin()
    return int(read_state(folder)["step"])


def _parts(step: int, state: VqganStep) -> list[Part]:
    parts = [
        _weights(_TOKENIZER_FILE, *file_content(state.tokenizer)),
        Part.capture(_TRAINER_FILE, state.state()),
        Part.capture(STATE_FILE, json.dumps({"step": step})),
    ]
    if state.average:
        parts.append(_weights(_WEIGHTS_FILE, *file_content(state.model)))
    if state.discriminator:
        parts.append(_weights(_DISCRIMINATOR_FILE, state.discriminator.state_dict(), {}))
    return parts


def _weights(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Part:
    return Part.capture(name, Weights(tensors, metadata))
