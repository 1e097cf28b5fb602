"""The same ten steps on one process and on every layout: losses, gradient norms, weights."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SmallWorld
from observed import grown, half_sums, read_observed, rehearse
from safetensors.torch import load_file
from worlds import Scenario, figures, held_out, layout, run_world

from megatron_nuwa.training.checkpoint import read_manifest

# The first test that asks for a run of some size carries out all runs of that size.
pytestmark = pytest.mark.timeout(1800)

LAYOUTS = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (3, 1, 1), (2, 2, 2)]
RESUMED = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2)]
TEN = ("schedule.steps=10", "optimizer.gradient_clipping=0.5")
RECOMPUTED = {kind: f"training.checkpoint_activations={kind}" for kind in ("layer", "selective")}
VARIANTS = {
    "fp32": ({}, ()),
    "recomputed": ({}, (RECOMPUTED["layer"],)),
    "bf16": ({"bf16": True}, ()),
}

TIED_FROZEN = ("model.tie_head=true", "model.train_codebook=false")

# Layout files that have no pipeline.
BF16_FILES = ("zero1_bf16", "zero2_bf16", "zero2_offload_bf16", "zero3_bf16")

# Changes of the recipe that hold on one process and on 2 × 2.
EVERYWHERE = {
    "tied": ("model.tie_head=true", "data.micro_batch_tokens=48"),
    "dropout": ("model.dropout=0.1", "training.checkpoint_activations=selective"),
    "frozen": ("model.train_codebook=false", "model.norm=post", "model.cross_attention=sequential"),
}


def scenario(kind: str, pipeline: int = 1, tensor: int = 1, data: int = 1) -> Scenario:
    settings, overrides = VARIANTS[kind]
    name = f"{kind}_pp{pipeline}_tp{tensor}_dp{data}"
    contents = layout(pipeline, tensor, **settings)
    return Scenario(name, contents, (*TEN, *overrides), observe=kind != "recomputed")


# Weights that two processes hold alike, and layouts where they do.
DISTURBED = {
    "decoder.1.attention_norm.weight": (layout(1, 2), "false"),
    "visual_embedding.codes.weight": (layout(2, 1), "true"),
}
# The observed runs of two processes.
OF_TWO = [
    *(scenario(kind, *s).name for kind in ("fp32", "bf16") for s in LAYOUTS if prod(s) == 2),
    *(f"fp32_zero{stage}" for stage in (2, 3)),
    *BF16_FILES,
]
OBSERVED = [
    *OF_TWO,
    *(scenario(kind, *s).name for kind in ("fp32", "bf16") for s in LAYOUTS if prod(s) > 2),
    "sequence",
]


class Runs:
    """All layouts and variants, carried out when one of as many processes is asked for."""

    def __init__(self, world: SmallWorld, root: Path) -> None:
        self._recipe, self._root = world.recipe, root
        self._waiting = _scenarios(world)
        self._failed: dict[int, Exception] = {}
        self._sizes = {run.name: size for size, runs in self._waiting.items() for run in runs}

    def folder(self, name: str) -> Path:
        """Of a run that is done."""
        size = self._sizes[name]
        if scenarios := self._waiting.pop(size, None):
            try:
                run_world(self._recipe, self._root, size, scenarios)
            except Exception as error:
                self._failed[size] = error
        if size in self._failed:
            raise self._failed[size]
        return self._root / name


@pytest.fixture(scope="module")
def runs(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(small_world, tmp_path_factory.mktemp("parity"))


def _scenarios(world: SmallWorld) -> dict[int, list[Scenario]]:
    by_size: dict[int, list[Scenario]] = {1: [scenario(kind) for kind in VARIANTS]}
    for pipeline, tensor, data in LAYOUTS:
        of_size = by_size.setdefault(pipeline * tensor * data, [])
        of_size += [scenario(kind, pipeline, tensor, data) for kind in VARIANTS]
    for sizes in RESUMED:
        for kind in ("fp32", "bf16"):
            whole = scenario(kind, *sizes)
            for changes in (("training.stop_at_step=4",), ()):
                by_size[sizes[0] * sizes[1] * sizes[2]].append(
                    Scenario(f"{whole.name}_resumed", whole.layout, (*TEN, *changes))
                )
    for stage in (2, 3):
        by_size[2].append(Scenario(f"fp32_zero{stage}", layout(zero=stage), TEN, observe=True))
        for kind, change in RECOMPUTED.items():
            for name, precision in (("fp32", {}), ("bf16", {"bf16": True})):
                recomputed = layout(zero=stage, **precision)
                by_size[2].append(
                    Scenario(f"{name}_zero{stage}_{kind}", recomputed, (*TEN, change))
                )
    for by in ("measured", "uniform"):
        by_size[2].append(Scenario(f"cut_{by}", layout(2, cut=by), TEN))
    for name in BF16_FILES:
        contents = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        by_size[2].append(Scenario(name, contents, TEN, observe=True))
    for size in (1, 2):
        contents = layout(size, bf16=True)
        by_size[size].append(Scenario(f"tied_frozen_pp{size}", contents, (*TEN, *TIED_FROZEN)))
    for name, changes in EVERYWHERE.items():
        by_size[1].append(Scenario(name, layout(), (*TEN, *changes)))
        by_size[4].append(Scenario(f"{name}_split", layout(2, 2), (*TEN, *changes)))
    sketches = (*TEN, *_sketches(world))
    by_size[1].append(Scenario("sketches", layout(), sketches))
    offloaded = {**layout(zero=3), "zero_force_ds_cpu_optimizer": False}
    offloaded["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    by_size[2].append(Scenario("sketches_zero3", layout(zero=3), sketches))
    by_size[2].append(Scenario("sketches_offloaded", offloaded, sketches))
    by_size[4].append(Scenario("sketches_split", layout(2, 2), sketches))
    pictures = ("samples.every=10", "samples.prompts=[a red square moves left]")
    sequence = layout(2, 2, sequence_parallel=True)
    for name, (of, tied) in DISTURBED.items():
        changes = (*TEN, "evaluation=null", f"model.tie_head={tied}")
        by_size[2].append(Scenario(f"disturbed_{name}", of, changes, observe=True, disturb=name))
    by_size[4].append(Scenario("sequence", sequence, (*TEN, *pictures), observe=True))
    return by_size


def _sketches(world: SmallWorld) -> list[str]:
    """A fourth task, some of whose steps read texts."""
    held_out = f"evaluation.corpora.s2v=['{world.sketched_clips}']"
    return [*world.sketch_overrides("s2v"), held_out, "data.caption_dropout=0.3"]


@pytest.mark.parametrize("kind", ["fp32", "recomputed"])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_fp32_trains_like_one_process(runs: Runs, sizes: tuple[int, int, int], kind: str) -> None:
    compare(runs, "fp32_pp1_tp1_dp1", scenario(kind, *sizes).name)


@pytest.mark.parametrize("recomputed", ["", "_layer", "_selective"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stages_train_like_one_process(runs: Runs, stage: int, recomputed: str) -> None:
    compare(runs, "fp32_pp1_tp1_dp1", f"fp32_zero{stage}{recomputed}")


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_zero_stages_recompute_what_they_computed(
    runs: Runs, stage: int, recomputed: str
) -> None:
    compare_bf16(runs, f"bf16_zero{stage}_{recomputed}")


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_bf16_trains_like_one_process(runs: Runs, sizes: tuple[int, int, int]) -> None:
    compare_bf16(runs, scenario("bf16", *sizes).name)


def test_a_table_on_two_stages_may_be_frozen(runs: Runs) -> None:
    compare_bf16(runs, "tied_frozen_pp2", "tied_frozen_pp1")


@pytest.mark.parametrize("name", BF16_FILES)
def test_bf16_layout_files_train_like_one_process(runs: Runs, name: str) -> None:
    compare_bf16(runs, name)


@pytest.mark.parametrize("by", ["measured", "uniform"])
def test_a_pipeline_can_be_cut_by_time_or_evenly(runs: Runs, by: str) -> None:
    compare(runs, "fp32_pp1_tp1_dp1", f"cut_{by}")


@pytest.mark.parametrize("name", EVERYWHERE)
def test_what_the_recipe_changes_is_the_same_everywhere(runs: Runs, name: str) -> None:
    compare(runs, name, f"{name}_split")


@pytest.mark.parametrize("name", ["sketches_split", "sketches_zero3", "sketches_offloaded"])
def test_sketches_are_learned_from_like_on_one_process(runs: Runs, name: str) -> None:
    compare(runs, "sketches", name)
    weights = load_file(runs.folder(name) / "checkpoints/step_00000010/model.safetensors")
    assert "sketch_embedding.projection.weight" in weights


def test_sequence_parallelism_trains_like_one_process(runs: Runs) -> None:
    compare(runs, "fp32_pp1_tp1_dp1", "sequence")


def test_a_model_in_four_parts_draws_samples(runs: Runs) -> None:
    shown = {path.name for path in (runs.folder("sequence") / "samples").iterdir()}
    assert shown == {"step_00000010_t2i.png", "step_00000010_t2v.png", "step_00000010_t2v_0.gif"}


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("sizes", RESUMED, ids=str)
def test_a_run_stopped_after_four_steps_continues_bit_for_bit(
    runs: Runs, sizes: tuple[int, int, int], kind: str
) -> None:
    name = scenario(kind, *sizes).name
    whole, resumed = runs.folder(name), runs.folder(f"{name}_resumed")
    assert len(figures(resumed)) == 10
    assert figures(resumed) == figures(whole)
    assert held_out(resumed) == held_out(whole)
    states, expected = (
        {
            name: file["sha256"]
            for name, file in read_manifest(run / "checkpoints/step_00000010").items()
            if name.endswith(("states.pt", ".safetensors"))
        }
        for run in (resumed, whole)
    )
    assert states == expected


@pytest.mark.parametrize("name", OF_TWO)
def test_nothing_grows_with_the_steps(runs: Runs, name: str) -> None:
    for notes in read_observed(runs.folder(name)):
        assert len(notes.lengths) == 3
        assert sum(notes.lengths[-1].values()) > 1000
        assert grown(notes) == {}


@pytest.mark.parametrize("sizes", [s for s in LAYOUTS if s[0] > 1], ids=str)
def test_no_stage_waits_for_its_device_in_the_middle_of_a_step(
    runs: Runs, sizes: tuple[int, int, int]
) -> None:
    """Shapes are told once; the CPU then has the GPU's next work ready before it is wanted."""
    observed = read_observed(runs.folder(scenario("fp32", *sizes).name))
    for notes in observed:
        reads = {(step, name) for step, name in notes.reads if name != "OptimizerStep"}
        # The last step's are mixed with the evaluation's.
        assert {step for step, _ in reads} <= {1, 10}
    # They are noticed where they are.
    assert any((1, "RecvActivation") in notes.reads for notes in observed)


@pytest.mark.parametrize("name", OBSERVED)
def test_the_processes_of_a_group_do_the_same_in_the_same_order(runs: Runs, name: str) -> None:
    """NCCL would wait for ever, or take one thing for another; gloo lets much of that pass."""
    observed = read_observed(runs.folder(name))
    assert len(observed) > 1
    assert all(len(notes.calls) > 50 for notes in observed)
    assert rehearse(observed) == ""
    assert all(call.is_in_main_thread for notes in observed for call in notes.calls)


@pytest.mark.parametrize("name", ["zero1_bf16", *(scenario("bf16", *s).name for s in LAYOUTS)])
def test_bf16_gradients_are_summed_in_fp32(runs: Runs, name: str) -> None:
    """Over replicas and over the stages of tied weights, under ZeRO 1."""
    assert all(half_sums(notes) == set() for notes in read_observed(runs.folder(name)))


def test_sums_in_bf16_are_noticed_where_they_are(runs: Runs) -> None:
    assert all(half_sums(notes) for notes in read_observed(runs.folder("zero2_bf16")))


@pytest.mark.parametrize("name", DISTURBED)
def test_weights_that_come_apart_are_named(runs: Runs, name: str) -> None:
    first, _ = read_observed(runs.folder(f"disturbed_{name}"))
    [sentence] = re.findall("warning: after step .*", first.said)
    assert sentence.startswith(f"warning: after step 10 {name} differs by ")
    assert " of its size among ranks 0 and 1, which should hold it alike: " in sentence


@pytest.mark.parametrize("name", OBSERVED)
def test_nothing_comes_apart_by_itself(runs: Runs, name: str) -> None:
    first, *_ = read_observed(runs.folder(name))
    assert "saved " in first.said
    assert "warning: after step" not in first.said


def compare_bf16(runs: Runs, name: str, expected: str = scenario("bf16").name) -> None:
    one, several = (torch.tensor(figures(runs.folder(run))) for run in (expected, name))
    assert len(several) == 10
    torch.testing.assert_close(several[:, :-1], one[:, :-1], rtol=2e-3, atol=0)
    torch.testing.assert_close(several[:, -1], one[:, -1], rtol=5e-3, atol=0)


def compare(runs: Runs, expected: str, name: str) -> None:
    one, several = (
        torch.tensor(figures(runs.folder(run)), dtype=torch.float64) for run in (expected, name)
    )
    assert len(several) == 10
    torch.testing.assert_close(several[:, :-1], one[:, :-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(several[:, -1], one[:, -1], rtol=1e-5, atol=0)
    assert held_out(runs.folder(name)) == pytest.approx(held_out(runs.folder(expected)), rel=1e-6)
    weights, truth = (
        load_file(runs.folder(run) / "checkpoints/step_00000010/model.safetensors")
        for run in (name, expected)
    )
    assert weights.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=2e-5)
