"""Communication, time and ranking, against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import ROOT

from megatron_nuwa.data.batches import TEXT_GRID, TaskName
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.flops import forward_flops, training_flops
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.parallel.cut import cut
from megatron_nuwa.parallel.layout import Layout, ParallelSettings, check_layout
from megatron_nuwa.parallel.units import Recomputation
from megatron_nuwa.plan.candidates import Judged, Machine, all_candidates, judge, judge_chosen
from megatron_nuwa.plan.communication import Links, boundary_bytes, communication
from megatron_nuwa.plan.devices import DEVICES, GIB
from megatron_nuwa.plan.memory import Step
from megatron_nuwa.plan.parameters import parameter_counts
from megatron_nuwa.plan.report import task_figures
from megatron_nuwa.plan.timing import days, pipelined, step_flops
from megatron_nuwa.plan.workload import MicroBatch, micro_batches, task_grid
from megatron_nuwa.training.costs import counted_costs
from megatron_nuwa.training.costs import unit_costs as run_costs
from megatron_nuwa.training.recipe import Recipe, load_recipe

A100 = DEVICES["a100-80gb"]
CLUSTER = Machine(A100, 64, 8)
VIDEO = Grid(21, 21, 10)


def judged(
    recipe: Recipe,
    deepspeed: dict[str, Any],
    *,
    pipeline: int = 1,
    tensor: int = 1,
    machine: Machine = CLUSTER,
    recomputation: Recomputation = "none",
    tokens: int | None = VIDEO.cells,
) -> Judged:
    assert recipe.model is not None
    settings = ParallelSettings(pipeline=pipeline, tensor=tensor)
    layout = check_layout(settings, deepspeed, recipe.model, machine.gpus)
    return judge(recipe, layout, deepspeed, machine, recomputation, tokens)


def total_parameters(recipe: Recipe) -> int:
    assert recipe.model is not None
    return parameter_counts(recipe.model)["total"]


@pytest.mark.parametrize(("stages", "count"), [(1, 5), (2, 4), (4, 12), (8, 3)])
def test_equal_stages_have_the_textbook_bubble(stages: int, count: int) -> None:
    seconds, bubble = pipelined([[0.25] * count] * stages)
    assert seconds == pytest.approx(0.25 * (count + stages - 1))
    assert bubble == pytest.approx((stages - 1) / (count + stages - 1))


def test_the_slowest_stage_sets_the_pace() -> None:
    seconds, _ = pipelined([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    assert seconds == 7.0


def test_data_parallel_volumes(paper: Recipe, deepspeed: dict[str, Any]) -> None:
    found = {kind.kind: kind for kind in judged(paper, deepspeed).traffic}
    parameters = total_parameters(paper)
    # fp32 gradients around a ring of 64, then bf16 weights half way round.
    assert found["data_parallel"].bytes == 2 * (4 * parameters * 63 // 64)
    assert not found["data_parallel"].overlaps
    assert found["zero_gather"].bytes == 2 * parameters * 63 // 64
    rounded = judged(paper, {**deepspeed, "communication_data_type": "bf16"}).traffic[0]
    assert 2 * rounded.bytes == found["data_parallel"].bytes
    # Eight cards of 25 GB/s a node are slower than NVLink's 300, at three quarters of the speed.
    assert found["data_parallel"].seconds == pytest.approx(
        found["data_parallel"].bytes / (200e9 * 0.75)
    )
    one_node = judged(paper, deepspeed, machine=Machine(A100, 8, 8)).traffic[0]
    assert one_node.seconds == pytest.approx(one_node.bytes / (300e9 * 0.75))
    assert judged(paper, deepspeed, machine=Machine(A100, 1, 8), tokens=None).traffic[0].bytes == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_higher_zero_stages_send_at_every_micro_batch(
    paper: Recipe, deepspeed: dict[str, Any], stage: int
) -> None:
    higher = {**deepspeed, "zero_optimization": {"stage": stage}}
    found = {kind.kind: kind for kind in judged(paper, higher).traffic}
    # bf16, half way round a ring of 64, for each of three tasks' micro-batches.
    once = 2 * total_parameters(paper) * 63 // 64
    assert judged(paper, higher).step.micro_batches[2:]
    count = len(judged(paper, higher).step.micro_batches)
    assert (found["data_parallel"].bytes, found["data_parallel"].overlaps) == (
        count * once,
        stage == 3,
    )
    if stage == 2:
        assert (found["zero_gather"].bytes, found["zero_gather"].overlaps) == (once, False)
    else:
        assert (found["zero_gather"].bytes, found["zero_gather"].overlaps) == (
            2 * count * once,
            True,
        )
        again = {k.kind: k for k in judged(paper, higher, recomputation="layer").traffic}
        assert again["zero_gather"].bytes == 3 * count * once


def test_tensor_parallel_and_pipeline_volumes(paper: Recipe, deepspeed: dict[str, Any]) -> None:
    found = {kind.kind: kind for kind in judged(paper, deepspeed, tensor=2).traffic}
    # 32 replicas: four clips of each of two tasks, and four images in one micro-batch.
    x, context = (8 * 4410 + 4 * 441) * 1280 * 2, 12 * 77 * 1280 * 2
    codes = (8 * 4410 + 4 * 441) * 256 * 2
    layers = 12 * 4 * context + 24 * (4 * x + context)
    assert found["tensor_parallel"].bytes == layers + codes + context + x
    assert found["pipeline"].bytes == 0
    sends = {kind.kind: kind for kind in judged(paper, deepspeed, pipeline=2).traffic}["pipeline"]
    boundary = x + context + 12 * 77 + 8 * (8 * 4410 + 4 * 441)
    assert sends.bytes == 2 * boundary
    assert sends.seconds == pytest.approx(sends.bytes / (25e9 * 0.75))


def test_a_sketch_sends_its_own_cells_and_no_mask(deepspeed: dict[str, Any]) -> None:
    config = NuwaConfig(sketch_codebook_size=1024, sketch_code_dim=64)
    x, batch = 2 * 4410 * 1280 * 2, MicroBatch("s2v", 2, VIDEO)
    split = Layout(1, 2, 1, 1, "bf16", False, False, "flops")
    assert boundary_bytes(config, split, batch) == 2 * x + 8 * 2 * 4410
    step, bounds = Step(config, split, deepspeed, [batch], "none"), [0, 39]
    found = {k.kind: k for k in communication(step, bounds, Links(split, A100, 8))}
    looked_up = 2 * 4410 * (256 + 64) * 2
    assert found["tensor_parallel"].bytes == 12 * 4 * x + 24 * 5 * x + looked_up + x
    repeated = replace(step, recomputation="layer")
    assert _reduced(repeated, bounds) == 12 * 6 * x + 24 * 7 * x + looked_up + x
    one_by_one = replace(step, config=config.model_copy(update={"cross_attention": "sequential"}))
    assert _reduced(one_by_one, bounds) == 12 * 4 * x + 24 * 7 * x + looked_up + x


def _reduced(step: Step, bounds: list[int]) -> int:
    """Bytes that one of two processes of a tensor group sends."""
    # Of several replicas, whose links are slower.
    links = Links(replace(step.layout, data=8), A100, 8)
    [found] = [k for k in communication(step, bounds, links) if k.kind == "tensor_parallel"]
    assert found.seconds == found.bytes / links.tensor
    return found.bytes


@pytest.mark.parametrize(
    ("sizes", "tensor", "data", "pipeline"),
    [
        # A100s reach three quarters of 300 GB/s inside a node of eight, of 25 GB/s a card outside.
        ((1, 2, 4), 300, 300, 300),
        ((1, 2, 8), 300, 100, 25),
        ((1, 8, 2), 300, 25, 25),
        ((1, 16, 2), 200, 25, 25),
        ((8, 1, 1), 300, 300, 300),
        ((2, 1, 8), 300, 300, 25),
    ],
)
def test_links_are_as_fast_as_what_a_group_spans(
    sizes: tuple[int, int, int], tensor: int, data: int, pipeline: int
) -> None:
    links = Links(Layout(*sizes, 1, "bf16", False, False, "flops"), A100, 8)
    found = (links.tensor, links.data, links.pipeline)
    assert found == pytest.approx(tuple(0.75e9 * speed for speed in (tensor, data, pipeline)))


def test_gradients_travel_as_wide_as_the_layout_has_them() -> None:
    config, batch = NuwaConfig(), MicroBatch("t2i", 2, Grid(21, 21, 1))
    bounds, sent = [0, 39], {}
    for precision, deepspeed in (
        ("fp32", {}),
        ("bf16", {"bf16": {"enabled": True}}),
        ("bf16", {"communication_data_type": "fp32"}),
        ("fp32", {"communication_data_type": "fp16"}),
    ):
        layout = Layout(1, 1, 2, 2, precision, False, False, "flops")  # type: ignore[arg-type]
        step = Step(config, layout, deepspeed, [batch], "none")
        found = communication(step, bounds, Links(layout, A100, 8))[0].bytes
        sent[precision, str(deepspeed)] = found
    wide, narrow, widened, narrowed = sent.values()
    assert wide == widened == 2 * narrow == 2 * narrowed


def test_the_recipe_for_sketches_trains_the_papers_model_further(paper: Recipe) -> None:
    recipe = load_recipe(ROOT / "launch/recipes/nuwa_870m_sketches.yaml")
    assert recipe.model is not None
    assert recipe.model.model_copy(update={"sketch_codebook_size": None}) == paper.model
    figures = task_figures(recipe)
    clip = forward_flops(recipe.model, "sketch", VIDEO, VIDEO)
    assert figures["s2v"]["forward"] == 64 * clip
    image = Grid(21, 21, 1)
    assert figures["s2i"]["forward"] == 128 * forward_flops(recipe.model, "sketch", image, image)
    # Encoder and cross-attention work on as many cells as the decoder writes, not on 77 words.
    assert clip > 1.3 * forward_flops(recipe.model, "text", TEXT_GRID, VIDEO)


def test_step_time_and_mfu_of_one_gpu(paper: Recipe, deepspeed: dict[str, Any]) -> None:
    assert paper.model is not None
    found = judged(paper, deepspeed, machine=Machine(A100, 1, 8), tokens=4 * VIDEO.cells)
    flops = 128 * sum(
        count * training_flops(paper.model, "text", TEXT_GRID, grid)
        for count, grid in ((2, VIDEO), (1, Grid(21, 21, 1)))
    )
    assert sum(step_flops(found.step)[:2]) == flops
    assert found.timing.compute == pytest.approx(flops / (312e12 * 0.58), rel=1e-3)
    assert found.timing.mfu == pytest.approx(flops / 312e12 / found.timing.step)
    assert found.timing.step == pytest.approx(found.timing.compute + found.timing.update)
    assert found.timing.tokens_per_second * found.timing.step == pytest.approx(128 * 9261)
    assert days(found.timing, 86_400) == pytest.approx(found.timing.step)
    again = judged(
        paper, deepspeed, machine=Machine(A100, 1, 8), tokens=4 * VIDEO.cells, recomputation="layer"
    )
    assert 1.25 < again.timing.compute / found.timing.compute < 1.34
    assert again.memory.total < found.memory.total


@pytest.mark.parametrize("recomputation", ["none", "layer"])
@pytest.mark.parametrize("by", ["flops", "uniform"])
@pytest.mark.parametrize("pipeline", [2, 4, 8])
def test_a_pipeline_is_cut_where_the_run_cuts_it(
    paper: Recipe, deepspeed: dict[str, Any], pipeline: int, by: Any, recomputation: Recomputation
) -> None:
    training = paper.training.model_copy(update={"checkpoint_activations": recomputation})
    recipe = paper.model_copy(update={"training": training})
    assert recipe.model is not None
    assert recipe.data is not None
    settings = ParallelSettings(pipeline=pipeline, cut=by)
    chosen = judge_chosen(recipe, settings, deepspeed, Machine(A100, 16, 8))
    grids = {task: task_grid(recipe.model, task) for task in recipe.data.tasks}
    costs = run_costs(recipe, grids, by, torch.device("cpu"))
    assert list(chosen.bounds) == cut(costs, pipeline)


def test_layers_that_are_recomputed_weigh_a_pass_more(paper: Recipe) -> None:
    assert paper.model is not None
    work: list[tuple[TaskName, Grid, int]] = [("t2v", VIDEO, 1)]
    once = counted_costs(paper.model, work, "flops", "none")
    again = counted_costs(paper.model, work, "flops", "layer")
    assert again[1:-1] == pytest.approx([4 / 3 * cost for cost in once[1:-1]])
    assert (again[0], again[-1]) == (once[0], once[-1])


def test_micro_batches_divide_a_replicas_share(paper: Recipe) -> None:
    found = micro_batches(paper, 16, 2 * VIDEO.cells)
    sizes = [(batch.task, batch.samples) for batch in found]
    assert sizes == [("t2i", 8), *[("v2v", 2)] * 4, *[("t2v", 2)] * 4]
    assert [batch.samples for batch in micro_batches(paper, 16, None)] == [8, 8, 8]
    with pytest.raises(UserError, match=r"t2i.batch_size 128 does not divide by 48"):
        micro_batches(paper, 48, None)


def test_ranking_puts_what_fits_first_and_tells_what_is_missing(
    paper: Recipe, deepspeed: dict[str, Any]
) -> None:
    machine = Machine(replace(A100, memory=8 * GIB), 16, 8)
    ranked = all_candidates(paper, ParallelSettings(), deepspeed, machine)
    assert all(candidate.layout.world_size == 16 for candidate in ranked)
    names = [(candidate.layout.name, candidate.recomputation) for candidate in ranked]
    assert len(set(names)) == len(names)
    fitting = [candidate for candidate in ranked if candidate.fits]
    others = ranked[len(fitting) :]
    assert fitting
    assert others
    assert not any(candidate.fits for candidate in others)
    seconds = [candidate.timing.step for candidate in fitting]
    assert seconds == sorted(seconds)
    for candidate in others:
        assert candidate.shortfall == candidate.memory.total - 8 * GIB > 0
    assert {c.layout.zero_stage for c in ranked} == {1, 2, 3}
    stages = {c.layout.zero_stage for c in ranked if c.layout.pipeline > 1}
    assert stages == {1}


def test_no_layout_is_ranked_that_cannot_be_compiled(
    paper: Recipe, deepspeed: dict[str, Any]
) -> None:
    training = paper.training.model_copy(update={"compile": True})
    compiled = paper.model_copy(update={"training": training})
    ranked = all_candidates(compiled, ParallelSettings(), deepspeed, Machine(A100, 8, 8))
    assert {(c.layout.tensor, c.layout.zero_stage) for c in ranked} == {(1, 1), (1, 2)}


def test_zero_2_is_expected_to_be_faster_by_what_it_rounds(
    paper: Recipe, deepspeed: dict[str, Any]
) -> None:
    """As README says of 64 A100s: ZeRO 1, which adds gradients up in fp32, costs 3 % more."""
    two = {**deepspeed, "zero_optimization": {"stage": 2}}
    wide = {**two, "communication_data_type": "fp32"}
    first, second, rounded_nowhere = (
        judged(paper, config, tokens=2 * VIDEO.cells).timing.step
        for config in (deepspeed, two, wide)
    )
    assert first / second == pytest.approx(1.03, abs=0.005)
    assert first < rounded_nowhere
