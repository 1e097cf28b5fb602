"""The layout of a run over its processes: pipeline × tensor × data, ZeRO stage and precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.mistakes import found
from megatron_nuwa.models.nuwa import NuwaConfig

Precision = Literal["fp32", "bf16", "fp16"]
# DeepSpeed's own names.
GradientDtype = Literal[
    "fp32",
    "float32",
    "float",
    "torch.float32",
    "bf16",
    "bfloat16",
    "torch.bfloat16",
    "fp16",
    "float16",
    "half",
    "torch.float16",
]

# What the recipe decides must not be decided a second time in the layout file.
_OWNED_BY_RECIPE = {
    "train_batch_size": "data.tasks.TASK.batch_size",
    "train_micro_batch_size_per_gpu": "data.tasks.TASK.batch_size",
    "gradient_accumulation_steps": "data.accumulation",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "tensorboard": "run",
    "activation_checkpointing": "training.checkpoint_activations",
}
# DeepSpeed's own words for what the key 'parallel' says.
_OWNED_BY_PARALLEL = ("pipeline", "tensor_parallel")
_OFFLOAD_KEYS = ("offload_optimizer", "offload_param")
# DeepSpeed reads both names.
_BF16_KEYS = ("bf16", "bfloat16")
_PRECISIONS = ("fp16", *_BF16_KEYS)
_GROUPS = ("zero_optimization", "data_types", *_PRECISIONS)
_SHOWN_LAYOUTS = 3


class ParallelSettings(Settings):
    """The key 'parallel' of a layout file; data parallelism takes the remaining processes."""

    pipeline: int = Field(1, ge=1)
    tensor: int = Field(1, ge=1)
    sequence_parallel: bool = False
    # What the pipeline's stages are balanced by.
    cut: Literal["flops", "measured", "uniform"] = "flops"


class DataTypes(Settings):
    """The key 'data_types', of which DeepSpeed would ignore what it does not know."""

    grad_accum_dtype: GradientDtype | None = None


@dataclass(frozen=True)
class Layout:
    """A layout that works: the number of processes along each axis, and how the state is held."""

    pipeline: int
    tensor: int
    data: int
    zero_stage: int
    precision: Precision
    offload: bool
    sequence_parallel: bool
    cut: str

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pipeline * self.tensor * self.data

    @property
    def name(self) -> str:
        """All of it in one word, such as `pp4_tp2_dp8_zero1_bf16`."""
        parts = [
            f"pp{self.pipeline}",
            f"tp{self.tensor}",
            *(["sp"] if self.sequence_parallel else []),
            f"dp{self.data}",
            f"zero{self.zero_stage}",
            *(["offload"] if self.offload else []),
            self.precision,
        ]
        return "_".join(parts)


def read_layout(path: Path) -> tuple[ParallelSettings, dict[str, Any]]:
    """The key 'parallel' of a layout file, and the rest, which is DeepSpeed's.

    Raises `UserError` for a file that cannot be read or that repeats what the recipe says, and for
    a precision that DeepSpeed would read in another way, or ignore.
    """
    try:
        # Some editors begin a file with a byte-order mark.
        layout = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"DeepSpeed config {path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"DeepSpeed config {path} is not valid JSON: {error}") from error
    if not isinstance(layout, dict):
        raise UserError(f"DeepSpeed config {path} must hold one JSON object")
    for key, owner in _OWNED_BY_RECIPE.items():
        if key in layout:
            raise UserError(f"DeepSpeed config {path}: '{key}' is set by the recipe's {owner}")
    for key in _OWNED_BY_PARALLEL:
        if key in layout:
            raise UserError(f"DeepSpeed config {path}: '{key}' is filled in from 'parallel'")
    for key in _GROUPS:
        if not isinstance(layout.get(key, {}), dict):
            raise UserError(
                f"DeepSpeed config {path}: {key} must be a group of fields, not "
                f"{found(layout[key])}"
            )
    for key in _PRECISIONS:
        # DeepSpeed takes 1 for true and "auto" for false.
        enabled = layout.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise UserError(
                f"DeepSpeed config {path}: {key}.enabled must be true or false, not "
                f"{found(enabled)}"
            )
    parse_settings(
        DataTypes, layout.get("data_types", {}), f"DeepSpeed config {path}, 'data_types'"
    )
    parallel = layout.pop("parallel", {})
    settings = parse_settings(ParallelSettings, parallel, f"DeepSpeed config {path}, 'parallel'")
    return settings, layout


def check_layout(
    settings: ParallelSettings, deepspeed: Mapping[str, Any], model: NuwaConfig, ranks: int
) -> Layout:
    """The layout of `ranks` processes.

    Raises `UserError` with the reason, and with the nearest layouts of as many processes that do
    work, for one that cannot.
    """
    state = _State.of(deepspeed)
    problem = state.problem() or _problem(settings, state, model, ranks)
    if problem is not None:
        raise UserError(problem + _suggestion(settings, state, model, ranks))
    return Layout(
        settings.pipeline,
        settings.tensor,
        ranks // (settings.pipeline * settings.tensor),
        state.zero_stage,
        state.precision,
        state.offload,
        settings.sequence_parallel,
        settings.cut,
    )


def bf16_settings(deepspeed: Mapping[str, Any]) -> Mapping[str, Any]:
    """DeepSpeed's section about bf16, under the first of its names; empty where there is none."""
    there = (key for key in _BF16_KEYS if deepspeed.get(key) is not None)
    return next((_section(deepspeed, key) for key in there), {})


def nearest_layouts(
    settings: ParallelSettings, deepspeed: Mapping[str, Any], model: NuwaConfig, ranks: int
) -> list[tuple[int, int, int]]:
    """Up to three (pipeline, tensor, data) of exactly `ranks` processes that work.

    The nearest first, by the sum of |log2| of the pipeline's and the tensor's change.
    """
    return _nearest(settings, _State.of(deepspeed), model, ranks)


@dataclass(frozen=True)
class _State:
    """What DeepSpeed's part of a layout file says about parameters, gradients and optimizer."""

    zero_stage: int
    offload: bool
    bf16: bool
    fp16: bool

    @staticmethod
    def of(deepspeed: Mapping[str, Any]) -> _State:
        zero = _section(deepspeed, "zero_optimization")
        stage = zero.get("stage", 0)
        if stage not in (1, 2, 3) or isinstance(stage, bool):
            # DeepSpeed's stage 0 tells no gradient norm in fp32 and sums gradients in bf16.
            named = f"not {stage!r}" if "stage" in zero else "and the layout does not name it"
            raise UserError(
                f"zero_optimization.stage must be 1, 2 or 3, {named}; on one process, too, where "
                "stage 1 divides nothing"
            )
        if zero.get("compute_grad_norm") is False:
            raise UserError(
                "zero_optimization.compute_grad_norm must not be false: train/grad_norm and "
                "training.guard need the norm"
            )
        devices = [_section(zero, key).get("device") for key in _OFFLOAD_KEYS]
        return _State(
            stage,
            offload=any(device not in (None, "none") for device in devices),
            bf16=bf16_settings(deepspeed).get("enabled") is True,
            fp16=_section(deepspeed, "fp16").get("enabled") is True,
        )

    @property
    def precision(self) -> Precision:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    def problem(self) -> str | None:
        """What is wrong whatever the number of processes."""
        if self.bf16 and self.fp16:
            return "bf16.enabled and fp16.enabled exclude each other: leave one of them out"
        return None


def _section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = tree.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"'{key}' of the DeepSpeed config must hold a JSON object, not {value!r}")
    return value


def _problem(
    settings: ParallelSettings, state: _State, model: NuwaConfig, ranks: int
) -> str | None:
    """Why the layout cannot work on that many processes, or None."""
    pipeline, tensor = settings.pipeline, settings.tensor
    return (
        _ranks_problem(pipeline, tensor, ranks)
        or _tensor_problem(tensor, settings.sequence_parallel, model)
        or _pipeline_problem(pipeline, state, model)
    )


def _ranks_problem(pipeline: int, tensor: int, ranks: int) -> str | None:
    if ranks % (pipeline * tensor):
        return (
            f"{ranks} processes do not divide by parallel.pipeline {pipeline} × "
            f"parallel.tensor {tensor}"
        )
    return None


def _tensor_problem(tensor: int, sequence_parallel: bool, model: NuwaConfig) -> str | None:
    if sequence_parallel and tensor == 1:
        return "parallel.sequence_parallel needs parallel.tensor of 2 or more"
    if model.heads % tensor:
        return f"model.heads {model.heads} do not divide by parallel.tensor {tensor}"
    inner = int(model.width * model.feed_forward_ratio)
    if inner % tensor:
        return (
            f"the feed-forward's width {inner} (model.width × model.feed_forward_ratio) does not "
            f"divide by parallel.tensor {tensor}"
        )
    for field in ("codebook_size", "text_vocabulary", "sketch_codebook_size"):
        size: int | None = getattr(model, field)
        if size is not None and size < tensor:
            return f"model.{field} {size} is less than parallel.tensor {tensor}"
    return None


def _pipeline_problem(pipeline: int, state: _State, model: NuwaConfig) -> str | None:
    if pipeline == 1:
        return None
    most = model.encoder_layers + model.decoder_layers + 2
    if pipeline > most:
        return (
            f"parallel.pipeline {pipeline} is more than the {most} stages that a model of "
            f"{model.encoder_layers} encoder and {model.decoder_layers} decoder layers can have"
        )
    if state.zero_stage != 1:
        return (
            f"parallel.pipeline {pipeline} works with zero_optimization.stage 1 only, not "
            f"{state.zero_stage}"
        )
    if state.offload:
        return f"parallel.pipeline {pipeline} works without offloading to the CPU only"
    return None


def _nearest(
    settings: ParallelSettings, state: _State, model: NuwaConfig, ranks: int
) -> list[tuple[int, int, int]]:
    if state.problem() is not None:
        return []

    def distance(candidate: tuple[int, int, int]) -> tuple[float, int, int]:
        pipeline, tensor, _ = candidate
        change = abs(log2(pipeline / settings.pipeline)) + abs(log2(tensor / settings.tensor))
        return change, pipeline, tensor

    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    candidates = [
        (pipeline, tensor, ranks // (pipeline * tensor))
        for pipeline in sizes
        for tensor in sizes
        if _problem(
            settings.model_copy(update={"pipeline": pipeline, "tensor": tensor}),
            state,
            model,
            ranks,
        )
        is None
    ]
    return sorted(candidates, key=distance)[:_SHOWN_LAYOUTS]


def _suggestion(settings: ParallelSettings, state: _State, model: NuwaConfig, ranks: int) -> str:
    nearest = _nearest(settings, state, model, ranks)
    if not nearest:
        return ""
    listed = ", ".join(
        f"pipeline {pipeline} × tensor {tensor} × data {data}" for pipeline, tensor, data in nearest
    )
    return f"; the nearest layouts of {ranks} processes that work: {listed}"
