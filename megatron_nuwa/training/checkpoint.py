"""Checkpoints of a run: written aside, checked, renamed; a reader finds a whole one or none.

`RUN/checkpoints/step_00001000/` holds DeepSpeed's sharded state, `model.safetensors` (weights for
generation), `state.json` (what a resume needs to know) and `manifest.json` (size and sha256 of
every file). `RUN/checkpoints/latest` names the newest.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_nuwa.files import sha256_of, sync, write_text_atomically
from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.processes import Processes

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
_PREFIX = "step_"


class DamagedCheckpointError(Exception):
    """A checkpoint whose files are not those of its manifest."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    keep: int

    def save(self, engine: Engine, step: int, state: dict[str, Any], processes: Processes) -> Path:
        """Write the state after `step` steps; every process must call it."""
        tag = f"{_PREFIX}{step:08d}"
        partial = self.folder / ".partial"
        if processes.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        processes.barrier()
        engine.deepspeed.save_checkpoint(str(partial), tag=tag, save_latest=False)
        weights = engine.whole_weights()
        processes.barrier()
        final = self.folder / tag
        if processes.is_first:
            config = engine.model.config.model_dump_json()
            save_file(weights, partial / tag / MODEL_FILE, metadata={"config": config})
            (partial / tag / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=2))
            _write_manifest(partial / tag)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial / tag, final)
            sync(self.folder)
            shutil.rmtree(partial)
            write_text_atomically(self.folder / "latest", tag + "\n")
            for old in self._all()[: -self.keep]:
                shutil.rmtree(old)
        processes.barrier()
        return final

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and a sentence for each newer one that is damaged."""
        complaints = []
        for path in reversed(self._all()):
            try:
                check(path)
            except DamagedCheckpointError as error:
                complaints.append(f"checkpoint {path} is damaged ({error}); using the one before")
            else:
                return path, complaints
        return None, complaints

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}[0-9]*"))


def check(checkpoint: Path) -> None:
    """Hold every file against the manifest.

    Raises `DamagedCheckpointError` that names the first file that differs.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST_FILE} is missing or unreadable") from error
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{name} is missing")
        if path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
            raise DamagedCheckpointError(f"{name} was changed or cut short")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was told about the run, and its step."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def load(engine: Any, checkpoint: Path) -> None:
    """Put a checkpoint's weights and optimizer state into an engine of the same layout."""
    engine.checkpoint_engine = _data_only_checkpoint_engine(engine)
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise DamagedCheckpointError(f"DeepSpeed found no state of this layout in {checkpoint}")


def _data_only_checkpoint_engine(engine: Any) -> Any:
    """DeepSpeed's reader, made to unpickle tensors and plain data only.

    Its own reader runs whatever code a file holds.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class DataOnlyCheckpointEngine(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            known = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location=map_location, weights_only=True)

    return DataOnlyCheckpointEngine(engine._config)


def _write_manifest(folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    for name in files:
        sync(folder / name)
    write_text_atomically(folder / MANIFEST_FILE, json.dumps({"files": files}, indent=2))
