"""The folder of one training: its resolved recipe, its environment, where its parts lie."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from megatron_nuwa.config import Settings, dump_settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import write_text_atomically

RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
# The tokenizers of a pretraining run, copied into it.
VQGAN_FILE = "tokenizers/vqgan.safetensors"
BPE_FILE = "tokenizers/bpe.json"
SKETCH_VQGAN_FILE = "tokenizers/sketch_vqgan.safetensors"
_REPORTED_PACKAGES = ("megatron-nuwa", "torch", "deepspeed", "numpy", "tokenizers", "safetensors")


def prepare_run_folder(run: Path, recipe: Settings, field: str = "run") -> None:
    """Create the run's folder and write `recipe.yaml` and `environment.json` into it.

    `field` is the recipe's that names the folder.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text_atomically(run / RECIPE_FILE, dump_settings(recipe))
        write_text_atomically(run / ENVIRONMENT_FILE, json.dumps(describe_environment(), indent=2))
    except OSError as error:
        raise UserError(
            f"the run folder {run} cannot be written: {error.strerror}; choose another with "
            f"{field}=FOLDER"
        ) from error


def describe_environment() -> dict[str, object]:
    """Versions, machine and launch command of this process."""
    versions = {}
    for package in _REPORTED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
