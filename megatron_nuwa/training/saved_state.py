"""Weights and Adam's moments of a checkpoint, by name, whatever layout wrote them.

DeepSpeed's own converter (`deepspeed.checkpoint.ds_to_universal`, 0.19.8) finds the same numbers
in a checkpoint that it can convert, but does not fit: it unpickles without `weights_only`, its
names differ between engines with and without a pipeline, it knows one padded vocabulary where this
model has two, what no pattern names it joins along dimension 0 without a word, and it writes the
whole state once more. Here the model itself knows how each of its weights is split; the files are
mapped into memory, each process reads what it needs, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.initialisation import shard_of
from megatron_nuwa.models.nuwa import Nuwa, NuwaConfig
from megatron_nuwa.parallel.collectives import TensorGroup
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.parallel.tensor import split_model
from megatron_nuwa.parallel.units import Units
from megatron_nuwa.training.checkpoint import MODEL_FILE, DamagedCheckpointError, load_data_only

# "fp32" is the weight itself in full precision.
Kind = Literal["fp32", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("fp32", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """Where `numel` numbers of a weight lie in one process's flat tensors."""

    file: Path
    group: int
    start: int
    numel: int


class SavedState:
    """The state in a checkpoint's folder that engines of ZeRO stage 1, 2 or 3 wrote."""

    def __init__(self, folder: Path, layout: Layout, config: NuwaConfig) -> None:
        if layout.zero_stage == 0:
            raise UserError(
                f"checkpoint {folder} was written with zero_optimization.stage 0, whose optimizer "
                "state cannot be taken over; begin another run with its weights: start.weights"
            )
        self._folder, self._layout = folder, layout
        with torch.device("meta"):
            model = Nuwa(config)
        if layout.tensor > 1:
            split_model(model, TensorGroup(None, 0, layout.tensor))
        self._parts: dict[str, Tensor] = dict(model.named_parameters())
        names = _saved_names(model, layout)
        self._open = cache(partial(load_data_only, mmap=True))
        self._pieces: dict[str, list[list[_Piece]]] = {}
        homes: dict[str, int] = {}
        for stage, tensor_rank, replica in product(
            range(layout.pipeline), range(layout.tensor), range(layout.data)
        ):
            for saved_name, piece in self._pieces_of(stage * layout.tensor + tensor_rank, replica):
                name = names[saved_name]
                # A tied table lies on the first and the last stage, the same on both.
                if homes.setdefault(name, stage) == stage:
                    no_pieces: list[list[_Piece]] = [[] for _ in range(layout.tensor)]
                    self._pieces.setdefault(name, no_pieces)[tensor_rank].append(piece)

    @property
    def trained(self) -> set[str]:
        """Names of the weights that the optimizer changed; all others were frozen."""
        return set(self._pieces)

    def part(self, name: str) -> Tensor:
        """A weight as the first process of a tensor group had it, on the meta device."""
        return self._parts[name]

    def whole(self, name: str, kind: Kind) -> Tensor:
        """A trained weight, or one of its moments, fp32, as the whole model has it."""
        part = self._parts[name]
        parts = [
            torch.cat([self._read(piece, kind) for piece in pieces])[: part.numel()].view(
                part.shape
            )
            for pieces in self._pieces[name]
        ]
        shard = shard_of(part)
        if shard is None:
            return parts[0]
        return torch.cat(parts, shard.dim).narrow(shard.dim, 0, shard.full)

    def frozen(self, name: str) -> Tensor:
        """A weight that was not trained, in the run's precision."""
        with safe_open(self._folder / MODEL_FILE, framework="pt") as weights:
            return weights.get_tensor(name)

    def updates(self) -> int:
        """How often Adam has changed the weights."""
        optimizer = self._adam(self._first_file())
        state = optimizer["state"].get(0, {})
        # Some kinds of Adam count in their groups.
        return int(state.get("step", optimizer["param_groups"][0].get("step", 0)))

    def loss_scaler(self) -> Any:
        """What scaled the losses in fp16."""
        return self._open(self._first_file())["optimizer_state_dict"].get("loss_scaler")

    def _first_file(self) -> Path:
        return self._optimizer_file(0, 0)

    def _optimizer_file(self, model_rank: int, replica: int) -> Path:
        prefix = "bf16_" if self._layout.precision == "bf16" else ""
        name = f"{prefix}zero_pp_rank_{replica}_mp_rank_{model_rank:02d}_optim_states.pt"
        return self._existing(name)

    def _existing(self, name: str) -> Path:
        path = self._folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing")
        return path

    def _pieces_of(self, model_rank: int, replica: int) -> Iterator[tuple[str, _Piece]]:
        """DeepSpeed's name and place of all that one process held."""
        file = self._optimizer_file(model_rank, replica)
        if self._layout.zero_stage < 3:
            # The row of all weights is cut, and each process says what lies where.
            mappings = self._open(file)["optimizer_state_dict"]["param_slice_mappings"]
            for group, mapping in enumerate(mappings):
                for name, address in mapping.items():
                    yield name, _Piece(file, group, address.start, address.numel)
            return
        # Every weight is cut into equal parts, the last ones padded.
        shapes_file = f"zero_pp_rank_{replica}_mp_rank_{model_rank:02d}_model_states.pt"
        for group, shapes in enumerate(self._open(self._existing(shapes_file))["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                numel = -(-shape.numel() // self._layout.data)
                yield name, _Piece(file, group, start, numel)
                start += numel

    def _read(self, piece: _Piece, kind: Kind) -> Tensor:
        state = self._open(piece.file)["optimizer_state_dict"]
        if kind == "fp32":
            is_stage_3 = self._layout.zero_stage == 3
            key = "fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"
            flat = state[key][piece.group]
        elif piece.group not in (moments := self._adam(piece.file)["state"]):
            # Not one step was taken: each was skipped.
            return torch.zeros(piece.numel)
        else:
            flat = moments[piece.group][kind]
        return flat.narrow(0, piece.start, piece.numel)

    def _adam(self, file: Path) -> dict[str, Any]:
        state = self._open(file)["optimizer_state_dict"]
        key = "optimizer_state_dict" if self._layout.zero_stage == 3 else "base_optimizer_state"
        return state[key]


def _saved_names(model: Nuwa, layout: Layout) -> dict[str, str]:
    """The model's names of weights by those in DeepSpeed's files."""
    if layout.pipeline == 1:
        return {f"model.{name}": name for name, _ in model.named_parameters()}
    from megatron_nuwa.parallel.pipeline import weight_names

    return weight_names(Units(model))
