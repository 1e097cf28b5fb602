"""Weights that processes hold alike, and how it is told that they have come apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nuwa.models.initialisation import Shard
from megatron_nuwa.training import replicas
from megatron_nuwa.training.engine import Engine, StageEngine, WholeEngine
from megatron_nuwa.training.replicas import (
    Difference,
    largest_difference,
    warn_where_replicas_differ,
)

CPU = torch.device("cpu")


def compared(monkeypatch: pytest.MonkeyPatch, *processes: dict[str, Tensor]) -> Difference:
    """What the last of these processes, ranks 3, 4, …, finds."""
    sent: list[Tensor] = []

    def all_reduce(tensor: Tensor, operation: Any, group: Any) -> None:
        assert operation == dist.ReduceOp.MAX
        assert group == "group"
        sent.append(tensor.clone())
        tensor.copy_(torch.stack(sent).amax(0))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    ranks = list(range(3, 3 + len(processes)))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: ranks)
    group: Any = "group"
    return [largest_difference(weights, group, CPU) for weights in processes][-1]


def random(seed: int, size: int = 1000) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_equal_weights_differ_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"one": random(0), "zero": torch.zeros(5)}
    assert compared(monkeypatch, weights, weights, weights).relative == 0
    assert compared(monkeypatch, {}, {}).relative == 0


def test_the_weight_that_differs_most_is_named_with_its_share_and_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever process has it, and whether it is the larger or the smaller one."""
    alike = {"a": torch.ones(4, 4), "b": torch.ones(100), "c": torch.ones(9)}
    for factor, share in ((1.01, 0.01 / 1.01), (0.99, 0.01)):
        other = {**alike, "a": alike["a"] * 1.001, "b": alike["b"] * factor}
        for processes in ((alike, other), (other, alike), (alike, other, alike)):
            found = compared(monkeypatch, *processes)
            assert found.name == "b"
            assert found.relative == pytest.approx(share, rel=1e-4)
            assert found.ranks == [3, 4, 5][: len(processes)]
    said = str(compared(monkeypatch, alike, {**alike, "b": alike["b"] * 0.99}))
    assert said == "b differs by 1.0e-02 of its size among ranks 3 and 4"


def test_a_change_that_keeps_the_sum_or_the_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(1)
    mean = weight.mean()
    # Its other sign has the same norm, and what is pulled apart the same sum.
    apart = mean + 1.05 * (weight - mean)
    for changed in (-weight, apart):
        found = compared(monkeypatch, {"weight": weight}, {"weight": changed})
        assert found.relative > 10 * replicas._ROUNDING


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_counts_most(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Before a weight that differs much, whichever process has it."""
    alike = {"a": torch.ones(16), "b": torch.ones(100)}
    other = {"a": torch.ones(16).index_fill(0, torch.tensor([3]), value), "b": torch.zeros(100)}
    for processes in ((alike, other), (other, alike), (other, other)):
        found = compared(monkeypatch, *processes)
        assert (found.name, found.relative) == ("a", float("inf"))
        assert str(found) == "a is not finite on one of the ranks 3 and 4"


def test_what_is_rounded_the_other_way_has_not_come_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random(2, 100_000).bfloat16()
    # Each number's neighbour, on the one side or the other.
    steps = torch.where(random(3, 100_000) > 0, 1, -1).to(torch.int16)
    rounded = (weight.view(torch.int16) + steps).view(torch.bfloat16)
    found = compared(monkeypatch, {"weight": weight}, {"weight": rounded})
    assert found.relative < replicas._ROUNDING
    # The order in which numbers are summed matters less still.
    wide = random(2, 100_000)
    found = compared(monkeypatch, {"weight": wide}, {"weight": wide.flip(0)})
    assert found.relative < 1e-12


def warned(
    monkeypatch: pytest.MonkeyPatch, own: list[float], others: list[float], is_first: bool = True
) -> None:
    """A process compares `own` in its groups; another one has found `others`."""
    found = iter([Difference(relative, f"own {relative}", [0, 1]) for relative in own])
    monkeypatch.setattr(replicas, "largest_difference", lambda *_: next(found))
    theirs = [Difference(relative, f"their {relative}", [2, 3]) for relative in others]
    engine: Any = SimpleNamespace(replicated_weights=lambda: [("group", {})] * len(own))
    processes: Any = SimpleNamespace(
        device=CPU, is_first=is_first, gather=lambda mine: [mine, *theirs]
    )
    warn_where_replicas_differ(engine, processes, 7)


@pytest.mark.parametrize(
    ("own", "others", "told"),
    [
        ([], [0.0], None),
        ([4e-4], [4e-4], None),
        (
            [1e-3, 2e-3, 1e-4],
            [1e-3],
            "own 0.002 differs by 2.0e-03 of its size among ranks 0 and 1",
        ),
        ([1e-3], [1e-4, 0.5], "their 0.5 differs by 5.0e-01 of its size among ranks 2 and 3"),
        ([], [6e-4], "their 0.0006 differs by 6.0e-04 of its size among ranks 2 and 3"),
    ],
)
def test_the_worst_of_all_groups_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own: list[float],
    others: list[float],
    told: str | None,
) -> None:
    warned(monkeypatch, own, others, is_first=False)
    assert capsys.readouterr().out == ""
    warned(monkeypatch, own, others)
    output = capsys.readouterr().out
    if told is None:
        assert output == ""
    else:
        assert output.count("\n") == 1
        assert output.startswith(f"warning: after step 7 {told}, which should hold it alike")


class Part(nn.Module):
    """Weights of a process: of its own, split, not here, partitioned by ZeRO 3."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.split, self.partitioned = (
            nn.Parameter(torch.full((size,), float(size))) for size in (2, 3, 4)
        )
        self.split.shard = Shard(0, 0, 2, 6)  # type: ignore[attr-defined]
        self.partitioned.ds_tensor = torch.zeros(1)  # type: ignore[attr-defined]
        self.elsewhere = nn.Parameter(torch.empty(5, device="meta"))


def engine_of(kind: type[Engine], tensor_group: object) -> Any:
    engine: Any = object.__new__(kind)
    engine.model = Part()
    engine.place = SimpleNamespace(tensor=SimpleNamespace(group=tensor_group))
    tied = [(engine.model.split, "stages")]
    engine.deepspeed = SimpleNamespace(
        module=SimpleNamespace(get_tied_weights_and_groups=lambda: tied)
    )
    return engine


def test_what_the_processes_of_a_group_hold_alike_is_compared() -> None:
    engine = engine_of(WholeEngine, "group")
    [(group, weights)] = engine.replicated_weights()
    assert group == "group"
    assert list(weights) == ["whole", "partitioned"]
    assert weights["whole"] is engine.model.whole
    assert weights["partitioned"] is engine.model.partitioned.ds_tensor
    assert engine_of(WholeEngine, None).replicated_weights() == []


def test_a_stage_compares_its_tied_weights_with_the_other_s() -> None:
    engine = engine_of(StageEngine, None)
    [(group, weights)] = engine.replicated_weights()
    assert (group, list(weights)) == ("stages", ["split"])
    assert weights["split"] is engine.model.split
    assert len(engine_of(StageEngine, "group").replicated_weights()) == 2
