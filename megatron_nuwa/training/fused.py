"""Which implementation of Adam and of layer norms a run takes: apex's, DeepSpeed's or torch's."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from megatron_nuwa.errors import UserError

AdamKind = Literal["auto", "apex", "deepspeed", "torch"]
NormKind = Literal["auto", "apex", "torch"]


def find_apex(part: str, name: str) -> Any | None:
    """A class of NVIDIA apex; None where it is missing.

    The package that PyPI calls apex is another one, and has neither part.
    """
    try:
        return getattr(import_module(f"apex.{part}"), name, None)
    except ImportError:
        return None


def make_adam(
    kind: AdamKind,
    parameters: Iterable[nn.Parameter],
    *,
    decoupled: bool,
    offloaded: bool = False,
    **settings: Any,
) -> tuple[torch.optim.Optimizer, str]:
    """An Adam and the name of what was taken; all kinds compute the same update.

    `decoupled` is AdamW's weight decay; `settings` are lr, betas, eps and weight_decay. "auto" is
    apex on GPUs that have it, else torch's own fused one. `offloaded`: DeepSpeed will put weights
    in host memory in the parameters' place, where apex cannot update them. Raises `UserError`
    where a kind that was asked for by name is missing or cannot do that.
    """
    parameters = list(parameters)
    on_gpu = not offloaded and any(parameter.is_cuda for parameter in parameters)
    if kind == "apex" and offloaded:
        raise UserError(
            "optimizer.implementation is 'apex', which updates weights on GPUs only, and the "
            "DeepSpeed config's offload_optimizer keeps them in host memory; set the field to "
            "'auto' or 'deepspeed', or take a layout that does not offload"
        )
    apex = find_apex("optimizers", "FusedAdam") if kind in ("auto", "apex") else None
    if kind == "apex" and apex is None:
        raise _missing("optimizer.implementation", "apex")
    if apex is not None and (on_gpu or kind == "apex"):
        return apex(parameters, adam_w_mode=decoupled, **settings), "apex FusedAdam"
    if kind == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        made = FusedAdam if on_gpu else DeepSpeedCPUAdam
        mode = {"adam_w_mode" if on_gpu else "adamw_mode": decoupled}
        return made(parameters, **mode, **settings), f"DeepSpeed {made.__name__}"
    plain = torch.optim.AdamW if decoupled else torch.optim.Adam
    # Not fused, it would make two temporaries as large as all weights.
    return plain(parameters, fused=True, **settings), f"torch {plain.__name__} (fused)"


def fuse_norms(kind: NormKind, model: nn.Module, device: torch.device) -> str:
    """Let apex's fused layer norm take the place of torch's, in place; the name of what was taken.

    Weights and their names stay. "auto" takes apex on GPUs that have it. Raises `UserError` where
    apex was asked for by name and is missing.
    """
    apex = find_apex("normalization", "FusedLayerNorm") if kind in ("auto", "apex") else None
    if kind == "apex" and apex is None:
        raise _missing("training.norm", "apex")
    if apex is None or (kind == "auto" and device.type != "cuda"):
        return "torch LayerNorm"
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            # Exact type: sequence parallelism has a norm of its own.
            if type(child) is nn.LayerNorm:
                fused = apex(child.normalized_shape, eps=child.eps)
                fused.weight, fused.bias = child.weight, child.bias
                setattr(module, name, fused)
    return "apex FusedLayerNorm"


def _missing(field: str, value: str) -> UserError:
    return UserError(
        f"{field} is '{value}', but NVIDIA apex cannot be imported here (PyPI's package of that "
        "name is another one); build it from its repository, or set the field to 'auto'"
    )
