"""Checkpoints of a VQ-GAN training: written whole, found again, pruned."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.models.vqgan import load_vqgan, save_vqgan
from megatron_nuwa.training.vqgan_step import VqganStep


def save_checkpoint(run: Path, step: int, state: VqganStep, keep: int) -> None:
    """Write `checkpoints/step_XXXXXXXX` for `step` finished steps, then point `latest` at it.

    The newest `keep` checkpoints stay. Called by the first process alone.
    """
    folder = run / "checkpoints"
    name = f"step_{step:08d}"
    temporary = folder / f".{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_vqgan(state.model, temporary / "vqgan.safetensors")
    if state.discriminator:
        weights = {
            name: value.contiguous() for name, value in state.discriminator.state_dict().items()
        }
        save_file(weights, temporary / "discriminator.safetensors")
    torch.save({"step": step, **state.state()}, temporary / "trainer.pt")
    for file in temporary.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(folder / name, ignore_errors=True)
    temporary.replace(folder / name)
    write_text_atomically(folder / "latest", name + "\n")
    for old in sorted(folder.glob("step_*"))[:-keep]:
        if old.name != name:
            shutil.rmtree(old)


def load_checkpoint(run: Path, state: VqganStep) -> int:
    """Take up the newest checkpoint of a run; returns the number of finished steps, 0 without one.

    Raises `UserError` when the checkpoint is damaged or belongs to another recipe.
    """
    latest = run / "checkpoints" / "latest"
    if not latest.is_file():
        return 0
    folder = run / "checkpoints" / latest.read_text(encoding="utf-8").strip()
    saved = load_vqgan(folder / "vqgan.safetensors")
    if saved.config != state.model.config:
        raise UserError(
            f"{folder} holds a VQ-GAN with other settings than the recipe's vqgan.model; train "
            f"into a new folder with vqgan.run=FOLDER"
        )
    try:
        trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        if state.discriminator:
            discriminator = load_file(folder / "discriminator.safetensors")
            state.discriminator.load_state_dict(discriminator)
        state.model.load_state_dict(saved.state_dict())
        state.load_state(trainer)
        return int(trainer["step"])
    # Damaged bytes make the readers raise whatever they stumble on.
    except Exception as error:
        raise UserError(
            f"the checkpoint {folder} is damaged or belongs to another recipe; name an older one "
            f"in {latest} or train into a new folder with vqgan.run=FOLDER"
        ) from error
