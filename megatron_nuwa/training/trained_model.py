"""A trained model with its tokenizers: from a run, a checkpoint, or one exported file."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sha256_of, why_unreadable
from megatron_nuwa.models.nuwa import Nuwa, NuwaConfig
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig, load_vqgan
from megatron_nuwa.models.weights_file import write_weights
from megatron_nuwa.training.checkpoint import (
    MODEL_FILE,
    STATE_FILE,
    Checkpoints,
    DamagedCheckpointError,
    check,
    read_manifest,
    read_state,
)
from megatron_nuwa.training.resume import layout_of
from megatron_nuwa.training.run_folder import (
    BPE_FILE,
    RECIPE_FILE,
    SKETCH_VQGAN_FILE,
    VQGAN_FILE,
)
from megatron_nuwa.training.saved_state import SavedState

_FORMAT = "megatron_nuwa.nuwa/1"
_MODEL, _VQGAN, _SKETCH_VQGAN = "model.", "vqgan.", "sketch_vqgan."


class TrainedFacts(Settings):
    """What is known of a trained model beside its weights."""

    model: NuwaConfig
    step: int
    # Which grids and how many frames a second it was trained on, by task.
    grids: dict[str, tuple[int, int, int]]
    frames_per_second: dict[str, float | None]


class TrainedModel(ABC):
    """Facts, weights by name, and tokenizers; weights are read when they are asked for."""

    origin: Path
    facts: TrainedFacts

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """A whole weight."""

    @abstractmethod
    def vqgan(self) -> Vqgan:
        """The tokenizer of its pictures, on the CPU."""

    @abstractmethod
    def sketch_vqgan(self) -> Vqgan | None:
        """The tokenizer of its sketches, on the CPU; None for a model that reads none."""

    @abstractmethod
    def bpe(self) -> TextTokenizer:
        """The tokenizer of its captions."""

    @property
    @abstractmethod
    def weights_sha256(self) -> str:
        """sha256 of the file that holds the weights."""

    @property
    def names(self) -> list[str]:
        """Names of all weights."""
        with torch.device("meta"):
            return [name for name, _ in Nuwa(self.facts.model).named_parameters()]

    def nuwa(self) -> Nuwa:
        """The model itself, fp32, on the CPU."""
        with torch.device("meta"):
            model = Nuwa(self.facts.model)
        weights = {name: self.weight(name).float() for name in self.names}
        model.load_state_dict(weights, assign=True)
        return model.eval()


def open_trained(path: Path, field: str, full_precision: bool = True) -> TrainedModel:
    """Open a run (its newest whole checkpoint), one of its checkpoints, or an exported file.

    Without `full_precision`, a run in half precision gives the weights that it computed with.

    Raises `UserError` that names `field`, the argument or field that `path` comes from.
    """
    # The optimizer's state is several times as large as all else, and holds nothing for these.
    files = None if full_precision else (STATE_FILE, MODEL_FILE)
    return open_located(locate(path, field, files), field, full_precision)


def locate(path: Path, field: str, files: Collection[str] | None = None) -> Path:
    """The checkpoint, whose files are all read and found whole, or the exported file, at a path.

    `files` are those that are read of a checkpoint, where not all are needed. Raises `UserError`
    that names `field`.
    """
    try:
        return _located(path, field, files)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{field}: {error.filename or path} cannot be read: {reason}") from error


def _located(path: Path, field: str, files: Collection[str] | None) -> Path:
    if path.is_file():
        return path
    if (path / STATE_FILE).is_file():
        try:
            check(path, files)
        except DamagedCheckpointError as error:
            raise UserError(f"{field}: checkpoint {path} is damaged ({error})") from error
        return path
    if not (path / RECIPE_FILE).is_file():
        raise UserError(
            f"{field}: {path} is no pretraining run, no checkpoint of one and no exported file"
        )
    newest, complaints = Checkpoints(path / "checkpoints", keep=1).newest(files)
    if newest is None:
        reason = f" ({complaints[0]})" if complaints else ""
        raise UserError(
            f"{field}: run {path} has no whole checkpoint yet{reason}; train it further first"
        )
    return newest


def open_located(path: Path, field: str, full_precision: bool = True) -> TrainedModel:
    """`open_trained` for what `locate` found."""
    if path.is_file():
        return _ExportedModel(path, field)
    return _Checkpoint(home_of(path), path, full_precision)


def home_of(path: Path) -> Path:
    """The folder that lasts: the run, also of one of its checkpoints, or an exported file's."""
    if (path / STATE_FILE).is_file():
        return path.resolve().parent.parent
    return path if path.is_dir() else path.parent


def export(trained: TrainedModel, output: Path, dtype: torch.dtype) -> None:
    """Write a model and its tokenizers to one safetensors file, which appears whole or not at all.

    Weights lie under `model.` in `dtype`, the VQ-GAN's under `vqgan.` as they are, and VQ-GAN-Seg's
    under `sketch_vqgan.` where there is one; the metadata hold `format`, `facts`, `vqgan` and
    `sketch_vqgan` (their settings) and `bpe` as JSON. Raises `OSError` where it cannot be written.
    """
    facts = trained.facts.model_dump(mode="json", exclude={"model"})
    metadata = {
        "format": _FORMAT,
        "facts": json.dumps({"model": trained.facts.model.description(), **facts}),
        "bpe": trained.bpe().to_json(),
    }
    tensors = {}
    for prefix, vqgan in ((_VQGAN, trained.vqgan()), (_SKETCH_VQGAN, trained.sketch_vqgan())):
        if vqgan is not None:
            metadata[prefix.rstrip(".")] = vqgan.config.description()
            for name, value in vqgan.state_dict().items():
                tensors[f"{prefix}{name}"] = value.contiguous()
    for name in trained.names:
        tensors[f"{_MODEL}{name}"] = trained.weight(name).to(dtype).contiguous()
    write_weights(output, tensors, metadata)


class _Checkpoint(TrainedModel):
    def __init__(self, run: Path, folder: Path, full_precision: bool) -> None:
        self.origin, self._run = folder, run
        state = read_state(folder)
        tasks = state["data"]["tasks"]
        facts = {
            "model": state["model"],
            "step": state["step"],
            "grids": {task: facts["grid"] for task, facts in tasks.items()},
            "frames_per_second": {
                task: facts["frames_per_second"] for task, facts in tasks.items()
            },
        }
        self.facts = parse_settings(TrainedFacts, facts, f"checkpoint {folder}")
        self._file: Any = safe_open(folder / MODEL_FILE, framework="pt")
        layout = layout_of(state["layout"])
        is_apart = layout.precision != "fp32" and layout.zero_stage > 0
        self._state = None
        if full_precision and is_apart:
            self._state = SavedState(folder, layout, self.facts.model)

    def weight(self, name: str) -> Tensor:
        if self._state is not None and name in self._state.trained:
            return self._state.whole(name, "fp32")
        return self._file.get_tensor(name)

    @property
    def weights_sha256(self) -> str:
        return read_manifest(self.origin)[MODEL_FILE]["sha256"]

    def vqgan(self) -> Vqgan:
        return load_vqgan(self._run / VQGAN_FILE)

    def sketch_vqgan(self) -> Vqgan | None:
        if self.facts.model.sketch_codebook_size is None:
            return None
        return load_vqgan(self._run / SKETCH_VQGAN_FILE)

    def bpe(self) -> TextTokenizer:
        return TextTokenizer.load(self._run / BPE_FILE)


class _ExportedModel(TrainedModel):
    def __init__(self, path: Path, field: str) -> None:
        self.origin = path
        if (reason := why_unreadable(path)) is not None:
            raise UserError(f"{field}: {path} cannot be read: {reason}")
        try:
            # Kept open: the BPE makes its header long, and there are many weights.
            self._file: Any = safe_open(path, framework="pt")
            self._metadata: dict[str, str] = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{field}: {path} is not a whole safetensors file; other kinds, which could run "
                "code when they are opened, are not read"
            ) from error
        if self._metadata.get("format") != _FORMAT:
            raise UserError(
                f"{field}: {path} was not written by launch/export.py (its format is "
                f"{self._metadata.get('format', 'unknown')!r}, not {_FORMAT!r})"
            )
        self.facts = parse_settings(TrainedFacts, self._json("facts"), f"{path}, 'facts'")
        missing = {f"{_MODEL}{name}" for name in self.names} - set(self._file.keys())
        if missing:
            raise UserError(f"{field}: {path} has no weight '{min(missing)}'")

    def weight(self, name: str) -> Tensor:
        return self._file.get_tensor(f"{_MODEL}{name}")

    @property
    def weights_sha256(self) -> str:
        return sha256_of(self.origin)

    def vqgan(self) -> Vqgan:
        return self._vqgan(_VQGAN)

    def sketch_vqgan(self) -> Vqgan | None:
        if self.facts.model.sketch_codebook_size is None:
            return None
        return self._vqgan(_SKETCH_VQGAN)

    def _vqgan(self, prefix: str) -> Vqgan:
        key = prefix.rstrip(".")
        config = parse_settings(VqganConfig, self._json(key), f"{self.origin}, '{key}'")
        with torch.device("meta"):
            model = Vqgan(config)
        names = [name for name in self._file.keys() if name.startswith(prefix)]  # noqa: SIM118
        weights = {name.removeprefix(prefix): self._file.get_tensor(name) for name in names}
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise UserError(f"{self.origin} holds another '{key}' than it describes") from error
        return model.eval()

    def bpe(self) -> TextTokenizer:
        return TextTokenizer.from_json(self._metadata.get("bpe", ""), f"{self.origin}, 'bpe'")

    def _json(self, key: str) -> dict[str, Any]:
        try:
            tree = json.loads(self._metadata[key])
        except (KeyError, json.JSONDecodeError) as error:
            raise UserError(f"{self.origin} carries no readable '{key}'") from error
        if not isinstance(tree, dict):
            raise UserError(f"{self.origin} carries no readable '{key}'")
        return tree
