"""Whether processes compute on NVIDIA GPUs or on the CPU; it is never left to chance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_nuwa.errors import UserError

# DeepSpeed's variable, which reaches other nodes in .deepspeed_env.
_CHOICE = "DS_ACCELERATOR"
# There as soon as the driver is loaded, and in every container that was given a GPU.
_NVIDIA_DRIVER = Path("/dev/nvidiactl")


def on_gpu() -> bool:
    """Whether this process computes on a GPU: where CUDA works, and DS_ACCELERATOR is not cpu."""
    return os.environ.get(_CHOICE) != "cpu" and torch.cuda.is_available()


def check_accelerator() -> None:
    """Raise `UserError` where a process would fall back to the CPU although a GPU is meant.

    It is meant where DS_ACCELERATOR=cuda says so, and where this machine has an NVIDIA driver;
    DS_ACCELERATOR=cpu takes the CPU all the same.
    """
    choice = os.environ.get(_CHOICE)
    if choice not in (None, "cpu", "cuda"):
        raise UserError(f"{_CHOICE} is '{choice}'; it must be cuda or cpu, or not be set")
    if choice == "cpu" or torch.cuda.is_available():
        return
    if choice == "cuda":
        sign = f"{_CHOICE}=cuda asks for a GPU"
    elif _NVIDIA_DRIVER.exists():
        sign = f"an NVIDIA driver is here ({_NVIDIA_DRIVER})"
    else:
        return
    raise UserError(
        f"{sign}, but CUDA does not work: {_why_not()}; mend that, or set {_CHOICE}=cpu to compute "
        "on the CPU"
    )


def default_device() -> torch.device:
    """What a lone process computes on: the current GPU, else the CPU.

    Raises `UserError` where it has no GPU although one is meant (`check_accelerator`).
    """
    check_accelerator()
    return torch.device("cuda" if on_gpu() else "cpu")


@contextmanager
def deepspeeds_choice() -> Iterator[None]:
    """Have a first import of DeepSpeed in the block take the CPU where there is no GPU.

    The variable is as it was afterwards, so that it only ever says what the user has set.
    """
    if on_gpu() or _CHOICE in os.environ:
        yield
        return
    os.environ[_CHOICE] = "cpu"
    try:
        yield
    finally:
        del os.environ[_CHOICE]


def _why_not() -> str:
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without it"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES is '{hidden}' (a Slurm job asks for GPUs: --gpus-per-node)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return "no GPU is found"
