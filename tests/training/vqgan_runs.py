"""Small trainings of a VQ-GAN, for tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT

COMMAND = ROOT / "launch" / "train_vqgan.py"


def write_recipe(folder: Path, media: Path, **changes: Any) -> Path:
    """A recipe of seconds, with every part of the training in use."""
    vqgan: dict[str, Any] = {
        "run": str(folder / "run"),
        "model": {
            "image_size": 32,
            "downsampling": 8,
            "patch_size": 2,
            "base_channels": 16,
            "residual_blocks": 1,
            "codebook_size": 32,
            "code_dim": 16,
            "lookup_dim": 4,
        },
        "data": {
            "train": [str(media / "train.jsonl")],
            "held_out": [str(media / "held.jsonl")],
            "frames": 8,
            "frames_per_second": 8,
            "decode_size": 36,
            "flip": True,
            "cache_frames": True,
        },
        "loss": {
            "perceptual_weight": 0.1,
            "perceptual": {"stages": 2},
            "adversarial_weight": 0.1,
            "discriminator_start": 20,
            "discriminator_channels": 8,
            "discriminator_layers": 1,
        },
        "codebook": {"start_step": 10, "kmeans_vectors": 256, "restart_every": 2},
        "optimizer": {"learning_rate": 0.004, "warmup_steps": 2, "betas": [0.9, 0.95]},
        "steps": 32,
        "ema_decay": 0.6,
        # All frames in every step, so that the loss does not depend on which ones come up.
        "batch_size": 34,
        "log_every": 1,
        "checkpoint_every": 12,
    }
    for group, values in changes.items():
        vqgan[group] = vqgan[group] | values if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "seed": 5, "vqgan": vqgan}))
    return path


def logged(run: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


def train_here(monkeypatch: pytest.MonkeyPatch, recipe: Path, *overrides: str) -> None:
    """Run the command in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    from launch.train_vqgan import main

    monkeypatch.setattr(sys, "argv", [COMMAND.name, str(recipe), *overrides])
    main()
