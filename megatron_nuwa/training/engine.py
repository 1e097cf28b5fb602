"""The DeepSpeed engine of a pretraining run, built from a recipe and a layout file."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_nuwa.data.batches import TokenBatch
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.training.recipe import OptimizerSettings

# What the recipe decides must not be decided a second time in the layout file.
_OWNED_BY_RECIPE = {
    "train_batch_size": "data.tasks.TASK.batch_size",
    "train_micro_batch_size_per_gpu": "data.tasks.TASK.batch_size",
    "gradient_accumulation_steps": "data.accumulation",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "tensorboard": "run",
}


class TaskLoss(nn.Module):
    """The model as DeepSpeed wants to call it: a micro-batch in, its loss out."""

    def __init__(self, model: Nuwa) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        """Mean cross-entropy of the batch's target tokens, nats a token."""
        return self.model.loss(batch.context(), batch.target, batch.grid)


def read_layout(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file; `UserError` for one that repeats what the recipe says."""
    try:
        layout = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"DeepSpeed config {path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"DeepSpeed config {path} is not valid JSON: {error}") from error
    if not isinstance(layout, dict):
        raise UserError(f"DeepSpeed config {path} must hold one JSON object")
    for key, owner in _OWNED_BY_RECIPE.items():
        if key in layout:
            raise UserError(f"DeepSpeed config {path}: '{key}' is set by the recipe's {owner}")
    return layout


def complete_layout(
    layout: dict[str, Any], micro_batches: int, ranks: int, gradient_clipping: float
) -> dict[str, Any]:
    """The layout with the recipe's batch and clipping filled in.

    DeepSpeed counts in micro-batches of one task, whose sample counts differ, so its own batch
    size says 1 a micro-batch and only the accumulation is real.
    """
    return {
        **layout,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batches * ranks,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": 1 << 62,
    }


def build_engine(model: Nuwa, settings: OptimizerSettings, config: dict[str, Any]) -> Any:
    """Wrap a model for distributed training; the process group must exist already."""
    deepspeed = _import_deepspeed()
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    engine, *_ = deepspeed.initialize(
        model=TaskLoss(model), optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by the names that torch is about to rename.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated.*")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Its shared-memory collectives take a minute to compile and bring nothing to gloo runs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
