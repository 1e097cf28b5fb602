"""The random state of a process, so that whatever draws from it goes on after a resume."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def random_file(rank: int) -> str:
    """Where a checkpoint keeps a process's random state."""
    return f"random/rank_{rank:05d}.pt"


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's generators, as plain data and tensors."""
    numpy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = numpy
    state = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def seed_random_state(seed: int) -> None:
    """Start all generators of this process anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random_state(checkpoint: Path, rank: int) -> None:
    """Put back what a process of this rank had; nothing where there were fewer processes."""
    path = checkpoint / random_file(rank)
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
