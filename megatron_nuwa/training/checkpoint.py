"""The checkpoints of a run on disk: whole ones by name, and how one becomes whole.

`RUN/checkpoints/step_00001000/` holds DeepSpeed's sharded state, `random/` with every process's
random state, `model.safetensors` (weights for generation), `state.json` (what a resume needs to
know), `recipe.yaml`, `environment.json`, and `manifest.json`: size and sha256 of every other file,
and a sha256 of itself. `RUN/checkpoints/latest` names the newest, for people; readers look for the
newest folder whose files are those of its manifest. Names that begin with a dot are unfinished or
on their way out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_nuwa.files import sha256_of, sync, try_to_write, write_text_atomically
from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.training.snapshot import FileRecord

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
LATEST_FILE = "latest"
_PREFIX = "step_"
_PARTIAL = ".partial"
_RETIRED = ".retired"


class DamagedCheckpointError(Exception):
    """A checkpoint whose files are not those of its manifest."""


def tag_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint's folder says."""
    return int(checkpoint.name.removeprefix(_PREFIX))


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and those of multiples of `keep_every`.

    One process writes; all may read.
    """

    folder: Path
    keep: int
    keep_every: int | None = None

    def begin(self, step: int) -> Path:
        """A new folder for the files of a checkpoint; what an interrupted save left is removed.

        `OSError` where it cannot be made.
        """
        self.abandon()
        self.remove_retired()
        for left in self.folder.glob(f".{LATEST_FILE}.*"):
            left.unlink()
        folder = self.folder / _PARTIAL / tag_of(step)
        folder.mkdir(parents=True)
        return folder

    def abandon(self) -> None:
        """Remove the checkpoint that was begun, if there is one."""
        shutil.rmtree(self.folder / _PARTIAL, ignore_errors=True)

    def commit(self, step: int, files: Mapping[str, FileRecord]) -> Path:
        """Make the checkpoint that was begun a whole one, and retire the ones that it replaces.

        `files` are all of its files, which are on the disk. Raises `OSError` and then has changed
        no whole checkpoint.
        """
        partial, final = self.folder / _PARTIAL / tag_of(step), self.folder / tag_of(step)
        manifest = json.dumps(_sealed({"step": step, "files": dict(files)}), indent=2)
        write_text_atomically(partial / MANIFEST_FILE, manifest)
        for folder in {partial, *((partial / name).parent for name in files)}:
            sync(folder)
        # A damaged one of the same step, or one of a trajectory that was given up.
        self._retire(final)
        os.replace(partial, final)
        sync(self.folder)
        self.abandon()
        # The checkpoint is whole by now, and no program depends on this.
        try_to_write(lambda: write_text_atomically(self.folder / LATEST_FILE, final.name + "\n"))
        # Later ones were found damaged; the run will replace them when it gets there.
        reached = [path for path in self.all() if step_of(path) <= step]
        for old in reached[: -self.keep]:
            if self.keep_every is None or step_of(old) % self.keep_every:
                self._retire(old)
        return final

    def remove_retired(self) -> None:
        """Delete what newer checkpoints replaced; may take long."""
        for old in self.folder.glob(f"{_RETIRED}*"):
            shutil.rmtree(old, ignore_errors=True)

    def newest(self, files: Collection[str] | None = None) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and a sentence for each newer one that is damaged.

        `files` are those that are looked at; all of them where it is left out.
        """
        complaints = []
        for path in reversed(self.all()):
            try:
                check(path, files)
            except DamagedCheckpointError as error:
                complaints.append(f"checkpoint {path} is damaged ({error}); using the one before")
            else:
                return path, complaints
        return None, complaints

    def all(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first, not checked."""
        return sorted(self.folder.glob(f"{_PREFIX}[0-9]*"))

    def _retire(self, checkpoint: Path) -> None:
        # Renamed before it is deleted, so that nobody ever finds half of one.
        if checkpoint.exists():
            name = f"{_RETIRED}-{checkpoint.name}-{os.urandom(4).hex()}"
            os.replace(checkpoint, self.folder / name)


def check(checkpoint: Path, files: Collection[str] | None = None) -> None:
    """Hold every file, or the given ones, against the manifest.

    Raises `DamagedCheckpointError` that names the first file that differs, and `PermissionError`
    for one that this user may not read, which says nothing of the file.
    """
    for name, expected in read_manifest(checkpoint).items():
        if files is not None and name not in files:
            continue
        path = checkpoint / name
        try:
            if not path.is_file():
                raise DamagedCheckpointError(f"{name} is missing")
            if path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
                raise DamagedCheckpointError(f"{name} was changed or cut short")
        except PermissionError:
            raise
        except OSError as error:
            raise DamagedCheckpointError(f"{name} cannot be read: {error.strerror}") from error


def read_manifest(checkpoint: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file of a checkpoint but the manifest itself.

    Raises `DamagedCheckpointError` where the manifest is missing, changed or of another format.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        seal = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST_FILE} is missing or unreadable") from error
    if _sealed(manifest)["sha256"] != seal:
        raise DamagedCheckpointError(f"{MANIFEST_FILE} was changed or cut short")
    if manifest["format_version"] != FORMAT_VERSION:
        raise DamagedCheckpointError(
            f"{MANIFEST_FILE} has format version {manifest['format_version']}, this program reads "
            f"{FORMAT_VERSION}"
        )
    return dict(manifest["files"])


def _sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its format version and its own checksum."""
    content = {"format_version": FORMAT_VERSION, **manifest}
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the run said about itself, and its step."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def load(engine: Any, checkpoint: Path) -> None:
    """Put a checkpoint's weights and optimizer state into an engine of the same layout."""
    engine.checkpoint_engine = _data_only_checkpoint_engine(engine)
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise DamagedCheckpointError(f"DeepSpeed found no state of this layout in {checkpoint}")


def load_data_only(path: str | Path, map_location: Any = None, mmap: bool = False) -> Any:
    """What DeepSpeed saved in a file: tensors and plain data, never code to run."""
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]
    with torch.serialization.safe_globals(known):
        return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)


def _data_only_checkpoint_engine(engine: Any) -> Any:
    """DeepSpeed's reader, made to unpickle tensors and plain data only.

    Its own reader runs whatever code a file holds.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class DataOnlyCheckpointEngine(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            return load_data_only(path, map_location)

    return DataOnlyCheckpointEngine(engine._config)
