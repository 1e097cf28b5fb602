"""Where a model takes another form because it is being compiled."""

from __future__ import annotations

import torch
from torch import Tensor


def is_compiled_for_gpus(tensor: Tensor) -> bool:
    """Whether `torch.compile` is making a program for GPUs; false wherever code simply runs."""
    return tensor.is_cuda and torch.compiler.is_compiling()
