"""DeepSpeed's sharded state: what it would write into which file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_nuwa.training.snapshot import Part

# DeepSpeed names its files in a folder (the tag) of a folder.
_FOLDER, _TAG = Path(), "checkpoint"


def deepspeed_parts(engine: Any) -> list[Part]:
    """The files of a DeepSpeed engine's checkpoint on this process; every process must call it.

    They hold the running model's tensors. Nothing is written.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    parts: list[Part] = []

    class CapturingCheckpointEngine(TorchCheckpointEngine):
        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """Folders are made when files are written."""

        def preserves_storage_sharing(self) -> bool:
            # Spares clones; the tensors are copied one by one later.
            return False

        def save(self, state_dict: Any, path: str) -> None:
            parts.append(Part.capture(str(Path(path).relative_to(_TAG)), state_dict))

    usual = engine.checkpoint_engine
    engine.checkpoint_engine = CapturingCheckpointEngine(engine._config)
    # A script that it would lay beside them at once, whether the disk is full or not.
    engine._copy_recovery_script = lambda _folder: None
    try:
        engine.save_checkpoint(str(_FOLDER), tag=_TAG, save_latest=False)
    finally:
        engine.checkpoint_engine = usual
    return parts
