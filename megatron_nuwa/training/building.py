"""An engine for a run: its DeepSpeed config, its cut, its starting weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.models.initialisation import assign
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.parallel.cut import cut, stage_table
from megatron_nuwa.parallel.deepspeed_config import communication_dtype
from megatron_nuwa.parallel.groups import Place
from megatron_nuwa.parallel.units import Recomputation, Units
from megatron_nuwa.training.engine import Engine, StageEngine, WholeEngine
from megatron_nuwa.training.recipe import Recipe


def complete_config(
    config: dict[str, Any], micro_batches: int, replicas: int, recipe: Recipe
) -> dict[str, Any]:
    """A layout's DeepSpeed part with what the recipe says filled in.

    DeepSpeed counts in micro-batches of one task, whose sample counts differ, so its own batch
    size says 1 a micro-batch and only the accumulation is real.
    """
    return {
        # It would wait for the device before and after every micro-batch; nobody reads it.
        "timers": {"throughput": {"enabled": False}},
        **config,
        "communication_data_type": communication_dtype(config),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batches * replicas,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "steps_per_print": 1 << 62,
        "zero_optimization": _zero(config, recipe.training.checkpoint_activations),
    }


def _zero(config: dict[str, Any], recompute: Recomputation) -> dict[str, Any]:
    """ZeRO's settings that go with what is computed a second time.

    DeepSpeed's own linear function, for stage 3, adds the bias in place to the matrix product that
    selective recomputation keeps, so that the second run would add it once more. It is there to
    hold no gathered weight from the forward to the backward pass; a layer that is run a second
    time holds none.
    """
    zero = dict(config.get("zero_optimization") or {})
    if recompute == "selective":
        zero["memory_efficient_linear"] = False
    return zero


def build_engine(
    recipe: Recipe,
    place: Place,
    config: dict[str, Any],
    device: torch.device,
    unit_costs: Sequence[float],
    codebook: Tensor | None,
    trained: Callable[[str], Tensor | None] | None = None,
    sketch_codebook: Tensor | None = None,
) -> Engine:
    """Engine of a run with starting weights; `unit_costs` decide where a pipeline is cut.

    The codebooks are those of the VQ-GAN and of VQ-GAN-Seg, where the model begins with them.
    `trained` gives whole weights to start from by their names, None for those that begin anew.

    Raises `UserError` where so much is frozen that a stage has nothing to train.
    """
    engine: WholeEngine | StageEngine
    if place.layout.pipeline == 1:
        engine = WholeEngine(recipe, place, config, device)
    else:
        bounds = cut(unit_costs, place.layout.pipeline)
        engine = StageEngine(recipe, place, config, device, bounds)
        if dist.get_rank() == 0:
            names = Units(engine.model).names
            Console().print(stage_table(names, unit_costs, bounds, place.layout.cut))
    if codebook is not None and not engine.model.visual_embedding.codes.weight.is_meta:
        engine.model.use_codebook(codebook)
    sketches = engine.model.sketch_embedding
    if sketch_codebook is not None and sketches is not None and not sketches.codes.weight.is_meta:
        engine.model.use_sketch_codebook(sketch_codebook)
    if trained is not None:
        _assign_all(engine.model, trained)
    _check_trainable(engine)
    engine.wrap()
    return engine


def _assign_all(model: Nuwa, trained: Callable[[str], Tensor | None]) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and (whole := trained(name)) is not None:
            assign(parameter, whole)


def _check_trainable(engine: Engine) -> None:
    """Every process sees every stage, and so they all fail alike."""
    for stage in range(engine.place.layout.pipeline):
        parameters = (p for module in engine.owned(stage) for p in module.parameters())
        if not any(p.requires_grad for p in parameters):
            kind = ReportedElsewhereError if dist.get_rank() else UserError
            raise kind(
                f"optimizer.frozen leaves nothing to train in stage {stage} of the pipeline; "
                "freeze less, or choose a layout with fewer stages"
            )
