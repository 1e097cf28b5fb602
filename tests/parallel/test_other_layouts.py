"""Runs that continue on another layout, held against runs that were never moved."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SmallWorld, lone_process
from safetensors.torch import load_file
from worlds import Scenario, carry_out, figures, layout, run_world

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sha256_of
from megatron_nuwa.models.initialisation import shard_of
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.parallel.pipeline import weight_names
from megatron_nuwa.parallel.units import Units
from megatron_nuwa.training.checkpoint import read_state
from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.pretrain import Pretraining, pretrain
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.resume import layout_of
from megatron_nuwa.training.saved_state import KINDS, Kind, SavedState

KEEP = "training.keep_checkpoints=9"
# One table on the pipeline's first and last stage, 541 captions' tokens that two do not divide; the
# fixture adds sketches.
TIED = (KEEP, "model.tie_head=true", "model.text_vocabulary=541")
FROZEN = (KEEP, "model.train_codebook=false")
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
# Every change between the three, in seven legs.
STAGES = ((1, 2), (3, 5), (2, 8), (1, 11), (2, 14), (3, 17), (1, 20))


def leg(name: str, stop: int, contents: dict[str, Any], changes: tuple[str, ...]) -> Scenario:
    """A part of a run, up to a step."""
    return Scenario(name, contents, (f"training.stop_at_step={stop}", "evaluation=null", *changes))


@pytest.fixture(scope="module")
def runs(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that move from layout to layout, and runs on one process that do not."""
    root = tmp_path_factory.mktemp("moves")

    def world(processes: int, *legs: Scenario) -> None:
        run_world(small_world.recipe, root, processes, legs)

    split = layout(2, 2, bf16=True)
    tied = (*TIED, *small_world.sketch_overrides("s2v"))
    world(4, leg("moved", 5, layout(2, 2), tied), leg("frozen", 3, split, FROZEN))
    for alone in (
        leg("undisturbed", 20, layout(), tied),
        leg("untied", 20, layout(), (KEEP,)),
        leg("moved", 10, layout(), tied),
    ):
        carry_out(alone, small_world.recipe, root, lone_process())
    tuned = (f"start.weights={root / 'untied'}", "optimizer.frozen=[text_*, encoder*]")
    carry_out(leg("tuned", 2, layout(), tuned), small_world.recipe, root, lone_process())
    world(
        2,
        leg("moved", 15, layout(), tied),
        *(leg("stages", stop, layout(zero=stage), (KEEP,)) for stage, stop in STAGES),
    )
    world(4, leg("moved", 20, layout(2, 1), tied), leg("tuned_split", 2, layout(2, 2), tuned))
    return root


@pytest.mark.parametrize(("name", "expected"), [("moved", "undisturbed"), ("stages", "untied")])
def test_a_moved_run_trains_like_one_that_stayed(runs: Path, name: str, expected: str) -> None:
    """(2, 2, 1) → (1, 1, 1) → (1, 1, 2) → (2, 1, 2), and ZeRO 1 ↔ 2 ↔ 3."""
    moved, truth = (
        torch.tensor(figures(runs / run), dtype=torch.float64) for run in (name, expected)
    )
    assert len(moved) == len(truth) == 20
    torch.testing.assert_close(moved[:, :-1], truth[:, :-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(moved[:, -1], truth[:, -1], rtol=1e-5, atol=0)


def test_frozen_layers_in_a_pipeline_train_like_one_process(runs: Path) -> None:
    split, one = (torch.tensor(figures(runs / run)) for run in ("tuned_split", "tuned"))
    torch.testing.assert_close(split, one, rtol=1e-5, atol=0)
    after, before = (
        load_file(runs / run / f"checkpoints/step_{step:08d}/model.safetensors")
        for run, step in (("tuned_split", 2), ("untied", 20))
    )
    # No task has pictures as its context.
    untouched = ("text_", "encoder", "context_positions")
    changed = {name for name in after if not after[name].equal(before[name])}
    assert changed == {name for name in after if not name.startswith(untouched)}


def saved_state(checkpoint: Path) -> SavedState:
    config = load_recipe(checkpoint.parents[1] / "recipe.yaml").model
    assert config is not None
    return SavedState(checkpoint, layout_of(read_state(checkpoint)["layout"]), config)


def test_every_weight_of_every_layout_is_found_by_its_name(runs: Path) -> None:
    layouts = set()
    for checkpoint in sorted(runs.glob("*/checkpoints/step_*")):
        saved = saved_state(checkpoint)
        recipe = load_recipe(checkpoint.parents[1] / "recipe.yaml")
        assert recipe.model is not None
        weights = load_file(checkpoint / "model.safetensors")
        assert weights.keys() == {name for name, _ in Nuwa(recipe.model).named_parameters()}
        frozen = {n for n in weights if any(fnmatch(n, p) for p in recipe.optimizer.frozen)}
        frozen |= set() if recipe.model.train_codebook else {"visual_embedding.codes.weight"}
        assert saved.trained == weights.keys() - frozen
        for name in saved.trained:
            assert saved.whole(name, "fp32").to(weights[name].dtype).equal(weights[name]), name
            assert saved.whole(name, "exp_avg").shape == weights[name].shape
        assert saved.updates() == int(checkpoint.name.removeprefix("step_"))
        layouts.add(layout_of(read_state(checkpoint)["layout"]).name)
    assert len(layouts) >= 7


def test_deepspeed_s_own_converter_finds_the_same_numbers(runs: Path, tmp_path: Path) -> None:
    """Told how each weight is split, and where no vocabulary is padded, which it cannot undo."""
    from deepspeed.checkpoint import ds_to_universal

    original = runs / "tuned_split/checkpoints/step_00000002"
    saved, checkpoint = saved_state(original), tmp_path / "step_00000002"
    shutil.copytree(original, checkpoint)
    theirs = pipeline_names(original)
    split = {name: shard_of(saved.part(ours)) for name, ours in theirs.items()}
    patterns = {
        "tp_replicated_parameter_patterns": [n for n, shard in split.items() if shard is None],
        "parameter_with_row_parallelism_patterns": [n for n, s in split.items() if s and s.dim],
    }
    info = {kind: [f"{re.escape(n)}$" for n in names] for kind, names in patterns.items()}
    for path in checkpoint.glob("mp_rank_*_model_states.pt"):
        state = torch.load(path, weights_only=True)
        torch.save(state | {"universal_checkpoint_info": info}, path)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(checkpoint),
            output_folder=str(tmp_path / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=False,
            inject_missing_state=False,
        )
    )
    checked = 0
    for name, ours in theirs.items():
        for kind in KINDS if ours in saved.trained else ():
            found = torch.load(tmp_path / f"universal/zero/{name}/{kind}.pt", weights_only=True)
            assert found["param"].equal(saved.whole(ours, kind)), (name, kind)
            checked += 1
    assert checked == 3 * len(saved.trained)


def pipeline_names(checkpoint: Path) -> dict[str, str]:
    config = load_recipe(checkpoint.parents[1] / "recipe.yaml").model
    assert config is not None
    with torch.device("meta"):
        return weight_names(Units(Nuwa(config)))


@pytest.mark.parametrize("more", [{}, OFFLOADED], ids=["", "offloaded"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("name", "step"), [("moved", 5), ("frozen", 3)])
def test_weights_and_moments_are_taken_over_bit_for_bit(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    step: int,
    stage: int,
    more: dict[str, Any],
) -> None:
    """And the checkpoint stays as it is, so a start that is killed leaves nothing behind."""
    checkpoint = tmp_path / f"run/checkpoints/step_{step:08d}"
    shutil.copytree(runs / name / "checkpoints" / checkpoint.name, checkpoint)
    layout_path = tmp_path / "layout.json"
    contents = layout(zero=stage, bf16=name == "frozen")
    contents["zero_optimization"] |= more
    layout_path.write_text(json.dumps({**contents, "zero_force_ds_cpu_optimizer": False}))
    engines: list[Engine] = []
    monkeypatch.setattr(Pretraining, "run", lambda self, _show: engines.append(self.engine))
    recipe = load_recipe(runs / name / "recipe.yaml", [f"run={tmp_path / 'run'}"])
    before = hashes(tmp_path / "run/checkpoints")
    pretrain(recipe, layout_path, lone_process())
    assert hashes(tmp_path / "run/checkpoints") == before

    [engine] = engines
    saved = saved_state(runs / name / "checkpoints" / checkpoint.name)
    parameters = {n: p for n, p in engine.model.named_parameters() if n in saved.trained}
    assert len(parameters) == len(saved.trained)
    if stage < 3:
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
    for weight, parameter in parameters.items():
        for kind in KINDS:
            assert held(parameter, kind).equal(saved.whole(weight, kind)), (weight, kind)
    weights = load_file(checkpoint / "model.safetensors")
    assert all(value.equal(weights[key]) for key, value in engine.whole_weights().items())
    assert engine.deepspeed.global_steps == step


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def held(parameter: torch.nn.Parameter, kind: Kind) -> torch.Tensor:
    """What an engine holds of a weight, asked by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind == "fp32":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


@pytest.mark.parametrize("contents", ["{}", '{"zero_optimization": {"stage": 0}}'])
def test_zero_stage_0_is_refused_with_a_reason(runs: Path, tmp_path: Path, contents: str) -> None:
    path = tmp_path / "layout.json"
    path.write_text(contents)
    recipe = load_recipe(runs / "untied/recipe.yaml")
    with pytest.raises(UserError, match=r"stage must be 1, 2 or 3, .*; on one process, too"):
        pretrain(recipe, path, lone_process())
