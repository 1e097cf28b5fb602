"""Tensors of checkpoints that other programs wrote, read without running anything in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import why_unreadable


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a safetensors file, a PyTorch state dict or a Lightning `.ckpt`.

    What else such a file holds, objects of the trainer that wrote it, is passed over, and their
    classes are never imported. Raises `UserError` when the file is missing or none of these.
    """
    if not path.is_file():
        raise UserError(f"the weights file {path} does not exist")
    if (reason := why_unreadable(path)) is not None:
        raise UserError(f"the weights file {path} cannot be read: {reason}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file") from error
    content = _unpickled(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no state dict: neither at its top nor as 'state_dict'")
    return tensors


def _unpickled(path: Path) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(_StandIn, name) for name in unknown]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    # Foreign bytes make the unpickler raise whatever it stumbles on.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as tensors and plain data; with the program that wrote it, "
            "save its state dict alone: torch.save(checkpoint['state_dict'], FILE), or as "
            "safetensors"
        ) from error


class _StandIn:
    """Takes the place of any class or function of another program, and makes empty containers.

    The reader fills those, and these only, with whatever an object held.
    """

    def __new__(cls, *arguments: Any, **named: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()
