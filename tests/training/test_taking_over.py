"""The small steps of putting a checkpoint of another layout into an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_nuwa.models.initialisation import Shard
from megatron_nuwa.training import checkpoint, relayout
from megatron_nuwa.training.relayout import load


def test_a_share_takes_its_numbers_and_keeps_its_padding() -> None:
    place = torch.full((4,), -1.0)
    relayout._copy(place, torch.arange(10.0), 3)
    assert place.tolist() == [3, 4, 5, 6]
    relayout._copy(place, torch.arange(10.0), 8)
    assert place.tolist() == [8, 9, 5, 6]
    # All of it is padding.
    relayout._copy(place, torch.arange(10.0), 12)
    assert place.tolist() == [8, 9, 5, 6]


def test_a_process_of_a_tensor_group_takes_its_part() -> None:
    whole, parameter = torch.arange(12.0).view(4, 3), nn.Parameter(torch.zeros(2, 3))
    assert relayout._part_of(whole, parameter).tolist() == list(range(12))
    parameter.shard = Shard(0, 1, 2, 4)  # type: ignore[attr-defined]
    assert relayout._part_of(whole, parameter).tolist() == list(range(6, 12))


@pytest.mark.parametrize("gradient", [None, 3.0])
def test_an_unused_adam_gets_moments_and_keeps_its_gradients(gradient: float | None) -> None:
    flat = nn.Parameter(torch.ones(3))
    flat.grad = None if gradient is None else torch.full((3,), gradient)
    adam = torch.optim.Adam([flat], lr=0.1)
    optimizer: Any = SimpleNamespace(optimizer=adam, fp32_groups_flat_partition=[flat])
    relayout._make_moments(optimizer)
    assert set(adam.state[flat]) == {"step", "exp_avg", "exp_avg_sq"}
    assert (flat.grad is None) == (gradient is None)
    relayout._set_updates(adam, 7)
    assert float(adam.state[flat]["step"]) == 7
    before = flat.detach().clone()
    # They are made only where they are missing.
    relayout._make_moments(optimizer)
    assert float(adam.state[flat]["step"]) == 7
    assert torch.equal(flat, before)


def test_weights_that_zero_3_hides_are_shown_for_the_update_and_hidden_again() -> None:
    flat = nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([flat], lr=0.1)
    [group] = adam.param_groups
    group["params"] = []
    optimizer: Any = SimpleNamespace(
        optimizer=adam,
        fp32_partitioned_groups_flat=[flat],
        _set_fp32_optimizer_param_groups=lambda: group.update(params=[flat]),
        _clear_fp32_optimizer_param_groups=lambda: group.update(params=[]),
    )
    relayout._make_moments(optimizer)
    assert "exp_avg" in adam.state[flat]
    assert group["params"] == []


def test_every_kind_of_adam_is_told_how_many_updates_it_has_made() -> None:
    """apex counts in its groups, DeepSpeed's in numbers, torch's in tensors."""
    counted, number = torch.zeros(()), {"step": 1}
    adam: Any = SimpleNamespace(
        param_groups=[{"step": 2}, {}], state={"a": {"step": counted}, "b": number, "c": {}}
    )
    relayout._set_updates(adam, 9)
    assert adam.param_groups == [{"step": 9}, {}]
    assert (float(counted), number, adam.state["c"]) == (9, {"step": 9}, {})


@pytest.mark.parametrize(
    ("layout", "state", "as_it_is"),
    [
        (None, {"bounds": [0, 4, 9], "adam": "torch"}, True),
        (None, {"bounds": [0, 5, 9], "adam": "torch"}, False),
        (None, {"bounds": [0, 4, 9], "adam": "apex"}, False),
        # Of an earlier version of this program.
        (None, {"bounds": [0, 4, 9]}, False),
        ("another", {"bounds": [0, 4, 9], "adam": "torch"}, False),
    ],
)
def test_only_the_same_layout_with_the_same_cut_and_adam_is_loaded_as_it_is(
    monkeypatch: pytest.MonkeyPatch, layout: Any, state: dict[str, Any], as_it_is: bool
) -> None:
    calls: list[tuple[Any, ...]] = []
    engine: Any = SimpleNamespace(
        bounds=[0, 4, 9],
        adam="torch",
        deepspeed="deepspeed",
        place=SimpleNamespace(layout="own"),
        model=SimpleNamespace(config="config"),
    )
    monkeypatch.setattr(relayout, "_is_first", lambda: False)
    monkeypatch.setattr(checkpoint, "load", lambda *found: calls.append(found))
    monkeypatch.setattr(relayout, "SavedState", lambda *found: found)
    monkeypatch.setattr(relayout, "take_over", lambda *found: calls.append(found))
    start: Any = SimpleNamespace(checkpoint="step_7", layout=layout, step=7)
    load(engine, start, state)
    saved = ("step_7", layout or "own", "config")
    assert calls == [("deepspeed", "step_7") if as_it_is else (engine, saved, 7)]
