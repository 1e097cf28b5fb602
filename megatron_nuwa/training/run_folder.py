"""The folder of one training: its resolved recipe, its environment, where its parts lie."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch

from megatron_nuwa.config import Settings, dump_settings
from megatron_nuwa.errors import MachineError, UserError
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


@contextmanager
def taken_back(run: Path) -> Iterator[None]:
    """Leave the run's folder as it was where the block refuses the run with a `UserError`.

    Only the files of `prepare_run_folder` are put back in a folder that was there; a new one goes.
    A `MachineError` refuses nothing: the next start goes on with what is there.
    """
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    files = (run / RECIPE_FILE, run / ENVIRONMENT_FILE)
    before = {path: path.read_bytes() if path.is_file() else None for path in files}
    try:
        yield
    except MachineError:
        raise
    except UserError:
        if run in new:
            shutil.rmtree(run, ignore_errors=True)
            for folder in new[1:]:
                # Somebody else may use it by now.
                with suppress(OSError):
                    folder.rmdir()
        else:
            _put_back(before)
        raise


def _put_back(files: Mapping[Path, bytes | None]) -> None:
    for path, content in files.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_text_atomically(path, content.decode())


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
