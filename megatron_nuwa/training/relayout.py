"""Putting a checkpoint into an engine, of the layout and the Adam that wrote it or of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_nuwa.models.initialisation import shard_of
from megatron_nuwa.training import checkpoint
from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.progress import track
from megatron_nuwa.training.resume import Start
from megatron_nuwa.training.saved_state import KINDS, Kind, SavedState


def load(engine: Engine, start: Start, state: Mapping[str, Any]) -> None:
    """Put the checkpoint of `start`, which says `state` of its run, into an engine."""
    assert start.checkpoint is not None
    adam = state.get("adam", "an Adam of unknown kind")
    # A pipeline cut by measured times may be cut elsewhere on the same layout. Every kind of Adam
    # keeps its counter and its settings in another form.
    if start.layout is None and state["bounds"] == engine.bounds and adam == engine.adam:
        checkpoint.load(engine.deepspeed, start.checkpoint)
        return
    before = start.layout or engine.place.layout
    if _is_first():
        print(f"{start.checkpoint} was written by layout {before.name} with {adam}", flush=True)
    take_over(engine, SavedState(start.checkpoint, before, engine.model.config), start.step)


@torch.no_grad()
def take_over(engine: Engine, saved: SavedState, step: int) -> None:
    """Give an engine the weights, moments and counters that a run had after `step` steps.

    The numbers are the saved ones, bit for bit; every process calls it. Works for ZeRO 1, 2 and
    3, whatever stage wrote the checkpoint.
    """
    deepspeed = engine.deepspeed
    optimizer = deepspeed.optimizer
    _make_moments(optimizer)
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    weights = [(n, p) for n, p in engine.model.named_parameters() if not p.is_meta]
    # Every tenth is told at once: a start that ends amid this has shown how far it came.
    told = track(weights, "weights taken over", quiet_seconds=0)
    for name, parameter in told if _is_first() else weights:
        whole = saved.whole(name, "fp32") if name in saved.trained else saved.frozen(name)
        _set_weight(optimizer, parameter, _part_of(whole, parameter))
        slots = dict(_slots(optimizer, parameter)) if parameter.requires_grad else {}
        for kind, (place, start) in slots.items():
            whole = whole if kind == "fp32" else saved.whole(name, kind)
            _copy(place, _part_of(whole, parameter), start)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()
    _set_updates(_adam_of(optimizer), saved.updates())
    if engine.loss_scale() is not None:
        optimizer.loss_scaler = saved.loss_scaler()
    deepspeed.global_steps = step
    deepspeed.global_samples = step * deepspeed.train_batch_size()


def _part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """What of a whole weight lies in this process's tensor-parallel part, flat."""
    shard = shard_of(parameter)
    return (whole if shard is None else shard.of(whole)).flatten()


def _set_weight(optimizer: Any, parameter: Any, part: Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        piece = parameter.ds_tensor
        start = piece.numel() * optimizer._get_param_partition_rank(parameter)
        _copy(piece.data, part, start)
    else:
        parameter.data.copy_(part.view(parameter.shape))


def _copy(place: Tensor, part: Tensor, start: int) -> None:
    """Numbers from `start` on; behind the last one stands padding."""
    numbers = part[start : start + place.numel()]
    place[: numbers.numel()].copy_(numbers)


def _slots(optimizer: Any, parameter: Any) -> Iterator[tuple[Kind, tuple[Tensor, int]]]:
    """Where this process keeps its share of a weight and its moments, and where that begins."""
    if hasattr(parameter, "ds_id"):
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        start = numel * optimizer._get_param_partition_rank(parameter)
    elif parameter._hp_mapping is None:
        return
    else:
        mapping = parameter._hp_mapping
        flat = _flat_groups(optimizer)[mapping.param_group_index]
        offset, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        start = mapping.lp_fragment_address.start
    for kind in KINDS:
        held = flat if kind == "fp32" else _adam_of(optimizer).state[flat][kind]
        yield kind, (held.data.narrow(0, offset, numel), start)


def _flat_groups(optimizer: Any) -> list[nn.Parameter]:
    """Each parameter group's full-precision weights, as much of them as this process updates."""
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"{type(optimizer).__name__} does not split its state")


def _adam_of(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer.optimizer


def _make_moments(optimizer: Any) -> None:
    """Have an Adam that was not used yet make its state, by an update that is overwritten."""
    adam, flats = _adam_of(optimizer), _flat_groups(optimizer)
    if all(adam.state.get(flat) for flat in flats):
        return
    before = [flat.grad for flat in flats]
    for flat, gradient in zip(flats, before, strict=True):
        flat.grad = torch.zeros_like(flat) if gradient is None else gradient
    # ZeRO 3 shows Adam its weights for the time of an update only.
    is_hidden = not any(group["params"] for group in adam.param_groups)
    if is_hidden:
        optimizer._set_fp32_optimizer_param_groups()
    adam.step()
    if is_hidden:
        optimizer._clear_fp32_optimizer_param_groups()
    for flat, gradient in zip(flats, before, strict=True):
        flat.grad = gradient


def _set_updates(adam: torch.optim.Optimizer, updates: int) -> None:
    """Adam's counter of steps, where each kind of Adam keeps it."""
    for group in adam.param_groups:
        if "step" in group:
            group["step"] = updates
    for state in adam.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(updates)
        elif "step" in state:
            state["step"] = updates


def _is_first() -> bool:
    return torch.distributed.get_rank() == 0
