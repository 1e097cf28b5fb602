"""Where `training.compile` works, and the reason where it does not."""

from __future__ import annotations

import torch
from torch.utils._triton import has_triton

from megatron_nuwa.errors import UserError
from megatron_nuwa.ops.build import CannotBuildError, cxx_compiler
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.training.recipe import TrainingSettings


def check_compile(settings: TrainingSettings, layout: Layout, device: torch.device) -> None:
    """`UserError` where the recipe asks for compiled layers and they cannot be had."""
    check_compilable(settings, layout)
    reason = _why_not(layout, device) if settings.compile else None
    if reason is not None:
        raise _refusal(reason)


def check_compilable(settings: TrainingSettings, layout: Layout) -> None:
    """`UserError` where the recipe asks for compiled layers and no device has them."""
    if not settings.compile:
        return
    if layout.tensor > 1:
        raise _refusal(
            f"layers that are split over processes (parallel.tensor {layout.tensor}) have none"
        )
    if layout.zero_stage == 3:
        raise _refusal(
            "ZeRO stage 3 gathers weights in the middle of a layer, which cannot be compiled"
        )
    if settings.norm == "apex":
        raise _refusal(
            "training.norm 'apex' keeps the compiler from fusing norms with their neighbours"
        )


def _refusal(reason: str) -> UserError:
    return UserError(f"training.compile: {reason}; set it to false")


def _why_not(layout: Layout, device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if has_triton() else "Triton, which compiles for GPUs, is missing or too old"
    if layout.precision != "fp32":
        # Seen with torch 2.13: its C++ of a bf16 backward pass declares a variable twice.
        return f"on a CPU it works in fp32 only, not in {layout.precision}"
    try:
        cxx_compiler()
    except CannotBuildError as error:
        return str(error)
    return None
