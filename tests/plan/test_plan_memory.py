"""Memory: ZeRO's shares by hand, activations against what autograd saves."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import ROOT
from torch.autograd.graph import saved_tensors_hooks

from megatron_nuwa.data.batches import TEXT_GRID
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, ContextKind, Nuwa, NuwaConfig
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.parallel.units import Flow, Recomputation, Units
from megatron_nuwa.plan.activations import layer_bytes
from megatron_nuwa.plan.devices import DEVICES, GIB
from megatron_nuwa.plan.memory import Step, kept_bytes, stage_memory
from megatron_nuwa.plan.parameters import parameter_counts, unit_parameters
from megatron_nuwa.plan.state import state_bytes
from megatron_nuwa.plan.workload import MicroBatch
from megatron_nuwa.training.recipe import Recipe

TEXT: tuple[ContextKind, Grid] = ("text", TEXT_GRID)
VIDEO, IMAGE = Grid(21, 21, 10), Grid(21, 21, 1)


def test_the_paper_model_has_its_parameters(paper: Recipe) -> None:
    assert paper.model is not None
    counts = parameter_counts(paper.model)
    d, codes = 1280, 12_288
    # Four projections with biases a attention, two linear layers, norms of two vectors.
    attention, feed_forward, norm = 4 * (d * d + d), 8 * d * d + 5 * d, 2 * d
    stacks = 12 * (attention + feed_forward + 2 * norm)
    stacks += 24 * (2 * attention + feed_forward + 2 * norm)
    positions = (1 + 1 + 77) * d + 2 * (21 + 21 + 10) * d
    ends = codes * 256 + 256 * d + positions + d + 2 * norm
    assert counts["transformer"] == stacks + ends
    assert counts["text_table"] == 49_408 * d
    assert counts["head"] == codes * d
    assert [round(counts[part] / 1e6, 1) for part in counts] == [869.5, 63.2, 15.7, 948.5]
    units = unit_parameters(paper.model)
    assert sum(unit.local(1) for unit in units) == counts["total"]
    assert units[1].local(1) == attention + feed_forward + 2 * norm
    # Split in two: all matrices and the biases of what is split by columns.
    assert units[1].local(2) == units[1].local(1) - (12 * d * d + 7 * d) // 2


def layout(stage: int, data: int, precision: Any = "bf16", offload: bool = False) -> Layout:
    return Layout(1, 1, data, stage, precision, offload, False, "flops")


def test_gradients_that_are_added_up_at_once_are_not_kept_in_bf16(
    deepspeed: dict[str, Any],
) -> None:
    assert deepspeed["bf16"]["immediate_grad_update"] is True
    state = state_bytes(1_600_000, 1000, layout(1, 8), deepspeed)
    assert state.gradients == 4 * 1_600_000


@pytest.mark.parametrize(
    ("stage", "data", "config", "expected"),
    [
        # bf16 weights, a bf16 and an fp32 gradient, then master weights and moments.
        (1, 1, "fp32", (2, 6, 12)),
        (1, 8, "fp32", (2, 6, 12 / 8)),
        (2, 8, "fp32", (2, 8 / 8, 12 / 8)),
        (3, 8, "fp32", (2 / 8, 8 / 8, 12 / 8)),
        (1, 8, None, (2, 2 + 4 / 8, 12 / 8)),
    ],
)
def test_zero_shares_are_exact(
    stage: int, data: int, config: str | None, expected: tuple[float, float, float]
) -> None:
    parameters = 1_600_000
    deepspeed = {"data_types": {"grad_accum_dtype": config}}
    state = state_bytes(parameters, 1000, layout(stage, data), deepspeed)
    found = (state.weights, state.gradients, state.optimizer)
    assert found == tuple(size * parameters for size in expected)


def test_fp32_and_offloading_are_counted_too() -> None:
    parameters = 1_600_000
    plain = state_bytes(parameters, 1000, layout(1, 1, "fp32"), {})
    assert (plain.weights, plain.gradients, plain.optimizer) == tuple(
        size * parameters for size in (4, 8, 12)
    )
    moved = state_bytes(parameters, 1000, layout(2, 4, "bf16", offload=True), {})
    assert moved.optimizer == 0
    assert moved.host == 16 * parameters / 4


def small(**changes: object) -> NuwaConfig:
    sizes = {
        "width": 32,
        "heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "codebook_size": 50,
        "code_dim": 8,
        "text_vocabulary": 60,
        "position_grid": (6, 6, 4),
    }
    return NuwaConfig.model_validate({**sizes, **changes})


def saved_by_autograd(config: NuwaConfig, batch: MicroBatch, dtype: torch.dtype) -> int:
    """Bytes of all that a real forward pass of the whole model and its loss saves."""
    model = Nuwa(config).to(dtype)
    samples, (kind, read), grid = batch.samples, batch.context, batch.grid
    mask = torch.arange(read.cells).expand(samples, -1) < 12 if kind == "text" else None
    words = torch.zeros(samples, read.cells, dtype=torch.int64)
    target = torch.zeros(samples, grid.cells, dtype=torch.int64)
    seen: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(Context(kind, words, read, mask), target, grid)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in weights)


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(width=64, heads=2, feed_forward_ratio=2),
        small(dropout=0.1, cross_attention="sequential"),
        small(norm="post"),
        small(decoder_attention="full", encoder_attention="full"),
        small(decoder_attention="axial"),
        small(visual_embedding="direct"),
    ],
    ids=["plain", "wide", "dropout", "post", "full", "axial", "direct"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("samples", "grid"), [(1, Grid(6, 6, 4)), (3, Grid(6, 6, 1))])
def test_what_is_kept_is_what_autograd_saves(
    config: NuwaConfig, precision: Any, samples: int, grid: Grid
) -> None:
    batch = MicroBatch("v2v", samples, grid)
    step = Step(config, layout(1, 1, precision), {}, [batch], "none")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    saved = saved_by_autograd(config, batch, dtype)
    assert kept_bytes(step, batch) == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("embedding", ["codebook", "direct"])
@pytest.mark.parametrize(
    "batch", [MicroBatch("s2v", 1, Grid(6, 6, 4)), MicroBatch("s2i", 3, IMAGE)]
)
def test_a_sketch_keeps_as_many_cells_as_its_target(batch: MicroBatch, embedding: str) -> None:
    config = small(
        sketch_codebook_size=40,
        sketch_code_dim=12,
        visual_embedding=embedding,
        position_grid=(21, 21, 10),
    )
    step = Step(config, layout(1, 1, "bf16"), {}, [batch], "none")
    saved = saved_by_autograd(config, batch, torch.bfloat16)
    assert kept_bytes(step, batch) == pytest.approx(saved, rel=0.01)


def test_recomputation_keeps_less_and_a_layer_only_its_input() -> None:
    config = NuwaConfig()
    found = layer_bytes(config, "decoder", TEXT, VIDEO, torch.bfloat16)
    x = 4410 * 1280 * 2
    assert found.kept("layer") == x
    assert found.kept("layer") < found.kept("selective") < found.kept("none")
    # Products: q, k, v, output; q, output and the short k, v; then 4 widths and one.
    products = (4 + 2 + 4 + 1) * x + 2 * 77 * 1280 * 2
    attention = 2 * x + 2 * 20 * 4410 * 4
    assert found.kept("selective") == x + products + attention


@pytest.mark.parametrize("recomputation", ["none", "selective", "layer"])
def test_a_compiled_layer_keeps_no_more(
    recomputation: Recomputation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the compiler's own choice of what to keep; the code that it makes keeps nothing."""
    config, grid = small(), Grid(6, 6, 4)
    compile_with = partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_with)
    torch._dynamo.reset()
    units = Units(Nuwa(config), recomputation, compiled=True)
    words = torch.zeros(1, TEXT_GRID.cells, dtype=torch.int64)
    context = Context("text", words, TEXT_GRID, words == 0)
    target = torch.zeros(1, grid.cells, dtype=torch.int64)
    # Decoder layers only.
    first = units.names.index("decoder.0")
    flow = units.run(Flow.of(context, target, grid), 0, first)
    seen: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        units.run(flow, first, first + 1)
    elsewhere = {t.untyped_storage()._cdata for t in (*units.model.parameters(), flow.context)}
    saved = sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in elsewhere)
    kept = layer_bytes(config, "decoder", TEXT, grid, torch.float32).kept(recomputation)
    # Where attention is run a second time, the state of the random numbers is kept for it.
    assert 0.85 * kept < saved < 1.03 * kept + 8192


def test_tensor_parallelism_splits_the_inner_activations() -> None:
    config = NuwaConfig()
    whole = layer_bytes(config, "decoder", TEXT, VIDEO, torch.bfloat16)
    half = layer_bytes(config, "decoder", TEXT, VIDEO, torch.bfloat16, tensor=2)
    x = 4410 * 1280 * 2
    # q, k, v and the output of self-attention; q and the output of the other; twice four widths of
    # the feed-forward.
    split = (4 + 2 + 8) * x
    assert whole.saved - half.saved == pytest.approx(split / 2, rel=0.01)


def test_sequence_parallelism_spreads_the_norms_inputs(deepspeed: dict[str, Any]) -> None:
    batch = MicroBatch("v2v", 1, VIDEO)
    kept = []
    for spread in (False, True):
        parallel = Layout(1, 2, 1, 1, "bf16", False, spread, "flops")
        kept.append(
            {
                recomputation: kept_bytes(
                    Step(NuwaConfig(), parallel, deepspeed, [batch], recomputation), batch
                )
                for recomputation in ("none", "layer")
            }
        )
    x, context = 4410 * 1280 * 2, 77 * 1280 * 2
    assert kept[0]["layer"] - kept[1]["layer"] == (24 * x + 12 * context) // 2
    assert kept[0]["none"] - kept[1]["none"] == 24 * x + 12 * context


def test_a_pipeline_holds_its_micro_batches_in_flight(
    paper: Recipe, deepspeed: dict[str, Any]
) -> None:
    assert paper.model is not None
    layout = Layout(2, 1, 1, 1, "bf16", False, False, "flops")
    batches = [MicroBatch("v2v", 1, VIDEO)] * 4
    step = Step(paper.model, layout, deepspeed, batches, "layer")
    bounds = [0, 25, 39]
    first, second = (stage_memory(step, bounds, s, DEVICES["a100-80gb"]) for s in (0, 1))
    x, context, codes = 4410 * 1280 * 2, 77 * 1280 * 2, 4410 * (256 * 2 + 8) + 77 * 8
    # Twelve encoder layers and their norm, eleven decoder layers; two micro-batches at once.
    assert first.activations == 2 * (codes + 13 * context + 11 * x + context)
    assert second.activations == 13 * x + context + 2 * x + 4410 * 8
    assert first.logits == 0
    # bf16 logits and their gradient.
    assert second.logits == 4 * 4410 * 12_288


@pytest.mark.parametrize(
    ("result", "device"),
    [
        ("cpu-amd-epyc-2-threads", "cpu"),
        ("cuda-nvidia-h200", "h200-141gb"),
        ("cuda-nvidia-h200_8-clips-compiled", "h200-141gb"),
        ("cuda-nvidia-h200_8-clips-eager", "h200-141gb"),
    ],
)
def test_the_measured_peak_of_the_real_step_was_foretold(
    paper: Recipe, deepspeed: dict[str, Any], result: str, device: str
) -> None:
    """Measured by `python -m benchmarks.real_step`."""
    assert paper.model is not None
    path = ROOT / f"benchmarks/results/real_step_{result}.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    batches = [
        MicroBatch(batch["task"], batch["samples"], Grid(*batch["grid"]))
        for batch in measured["micro_batches"]
    ]
    step = Step(paper.model, layout(1, 1), deepspeed, batches, measured["recomputation"])
    foretold = stage_memory(step, [0, 39], 0, DEVICES[device]).total / GIB
    assert foretold == pytest.approx(measured["peak_gib"], rel=0.15)
