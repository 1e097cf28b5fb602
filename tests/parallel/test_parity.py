"""The same ten steps on one process and on every layout: losses, gradient norms, weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import SmallWorld
from safetensors.torch import load_file
from worlds import Scenario, figures, held_out, layout, run_world

LAYOUTS = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (3, 1, 1), (2, 2, 2)]
TEN = ("schedule.steps=10", "optimizer.gradient_clipping=0.5")
VARIANTS = {
    "fp32": ({}, ()),
    "recomputed": ({}, ("training.checkpoint_activations=layer",)),
    "bf16": ({"bf16": True}, ()),
}


def scenario(kind: str, pipeline: int = 1, tensor: int = 1, data: int = 1) -> Scenario:
    settings, overrides = VARIANTS[kind]
    name = f"{kind}_pp{pipeline}_tp{tensor}_dp{data}"
    return Scenario(name, layout(pipeline, tensor, **settings), (*TEN, *overrides))


@pytest.fixture(scope="module")
def runs(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layouts and variants, one start a number of processes."""
    root = tmp_path_factory.mktemp("parity")
    by_size: dict[int, list[Scenario]] = {1: [scenario(kind) for kind in VARIANTS]}
    for pipeline, tensor, data in LAYOUTS:
        of_size = by_size.setdefault(pipeline * tensor * data, [])
        of_size += [scenario(kind, pipeline, tensor, data) for kind in VARIANTS]
    for stage in (2, 3):
        name = f"fp32_zero{stage}"
        by_size[2].append(Scenario(name, layout(zero=stage), TEN))
    for size, scenarios in by_size.items():
        run_world(small_world.recipe, root, size, scenarios)
    return root


@pytest.mark.parametrize("kind", ["fp32", "recomputed"])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_fp32_trains_like_one_process(runs: Path, sizes: tuple[int, int, int], kind: str) -> None:
    compare(runs, "fp32_pp1_tp1_dp1", scenario(kind, *sizes).name)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stages_train_like_one_process(runs: Path, stage: int) -> None:
    compare(runs, "fp32_pp1_tp1_dp1", f"fp32_zero{stage}")


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_bf16_trains_like_one_process(runs: Path, sizes: tuple[int, int, int]) -> None:
    one, several = (
        torch.tensor(figures(runs / scenario("bf16", *s).name)) for s in ((1, 1, 1), sizes)
    )
    assert len(several) == 10
    torch.testing.assert_close(several[:, :-1], one[:, :-1], rtol=2e-3, atol=0)


def compare(runs: Path, expected: str, name: str) -> None:
    one, several = (
        torch.tensor(figures(runs / run), dtype=torch.float64) for run in (expected, name)
    )
    assert len(several) == 10
    torch.testing.assert_close(several[:, :-1], one[:, :-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(several[:, -1], one[:, -1], rtol=1e-5, atol=0)
    assert held_out(runs / name) == pytest.approx(held_out(runs / expected), rel=1e-6)
    weights, truth = (
        load_file(runs / run / "checkpoints/step_00000010/model.safetensors")
        for run in (name, expected)
    )
    assert weights.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=2e-5)
