"""Runs that continue on another layout, held against a run that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import SmallWorld
from safetensors.torch import load_file
from worlds import Scenario, figures, layout, run_world

from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.training.checkpoint import read_state
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.resume import layout_of
from megatron_nuwa.training.saved_state import SavedState

TIED = ("model.tie_head=true", "training.keep_checkpoints=9")
# One process's run is the truth; its vocabulary of 541 entries does not divide by two.
MOVES = ("training.keep_checkpoints=9",)
ZERO_STAGES = (1, 3, 2, 1, 2, 3, 1)
CHAIN = [(2, 2, 1), (1, 1, 1), (1, 1, 2), (2, 1, 2)]


def part(name: str, step: int, contents: dict, *changes: str) -> Scenario:
    """A run up to a step."""
    return Scenario(name, contents, (f"training.stop_at_step={step}", *changes))


@pytest.fixture(scope="module")
def runs(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that move from layout to layout, and runs on one process that do not."""
    root = tmp_path_factory.mktemp("moves")

    def world(processes: int, *scenarios: Scenario) -> None:
        run_world(small_world.recipe, root, processes, scenarios)

    world(
        4,
        part("moved", 5, layout(2, 2), *MOVES),
        part("tied", 7, layout(2, 2), *TIED),
        part("frozen", 7, layout(2, 2, bf16=True), *MOVES, "model.train_codebook=false"),
    )
    world(
        1,
        part("undisturbed", 20, layout()),
        part("undisturbed_tied", 20, layout(), *TIED),
        part("moved", 10, layout(), *MOVES),
    )
    world(
        2,
        *(
            part("stages", min(3 * number + 2, 20), layout(zero=stage), *MOVES)
            for number, stage in enumerate(ZERO_STAGES)
        ),
        part("moved", 15, layout(), *MOVES),
        part("tied", 14, layout(zero=3), *TIED),
        part(
            "frozen", 9, layout(zero=3, bf16=True), *MOVES, "model.train_codebook=false"
        ),
    )
    world(
        4,
        part("moved", 20, layout(2, 1), *MOVES),
        part("tied", 20, layout(1, 2), *TIED),
    )
    return root


@pytest.mark.parametrize(
    ("name", "expected"),
    [("moved", "undisturbed"), ("stages", "undisturbed"), ("tied", "undisturbed_tied")],
)
def test_losses_stay_those_of_a_run_that_was_never_moved(
    runs: Path, name: str, expected: str
) -> None:
    moved, truth = (torch.tensor(figures(runs / run), dtype=torch.float64) for run in (name, expected))
    print(((moved - truth).abs() / truth).max(0))
    assert len(moved) == len(truth) == 20
    torch.testing.assert_close(moved[:, :-1], truth[:, :-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(moved[:, -1], truth[:, -1], rtol=1e-5, atol=0)


def test_every_weight_of_every_checkpoint_is_found_by_its_name(
    runs: Path, small_world: SmallWorld
) -> None:
    checked = 0
    for checkpoint in sorted(runs.glob("*/checkpoints/step_*")):
        state = read_state(checkpoint)
        config = load_recipe(checkpoint.parents[1] / "recipe.yaml").model
        assert config is not None
        saved = SavedState(checkpoint, layout_of(state["layout"]), config)
        weights = load_file(checkpoint / "model.safetensors")
        names = {name for name, _ in Nuwa(config).named_parameters()}
        frozen = set() if config.train_codebook else {"visual_embedding.codes.weight"}
        assert saved.trained == names - frozen
        assert weights.keys() == names
        for name in saved.trained:
            assert saved.whole(name, "fp32").to(weights[name].dtype).equal(weights[name]), name
            assert saved.whole(name, "exp_avg_sq").shape == weights[name].shape
        assert saved.updates() == int(checkpoint.name.removeprefix("step_"))
        checked += 1
    assert checked >= 16
