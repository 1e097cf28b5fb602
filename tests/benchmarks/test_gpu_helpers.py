"""What the benchmarks of a GPU work out without one: kernels of a trace, the largest that fits."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

import pytest
import torch
from helpers import ROOT, lone_process
from rich.console import Console
from torch import Tensor

from benchmarks import real_step
from benchmarks.harness.kernels import kind_of, read_trace, show_profile
from benchmarks.harness.largest import fits_in_memory, largest, largest_mix
from benchmarks.harness.options import SMALL
from benchmarks.harness.step_plan import Mix, StepPlan, token_batches
from megatron_nuwa.data.batches import TokenBatch
from megatron_nuwa.plan.devices import DEVICES
from megatron_nuwa.training.recipe import load_recipe


def event(name: str, start: float, length: float, category: str = "kernel") -> dict[str, object]:
    return {"name": name, "cat": category, "ts": start, "dur": length}


TRACE = [
    event("cudaLaunchKernel", 0, 90_000, "cuda_runtime"),
    event("step", 0, 90_000, "gpu_user_annotation"),
    event("nvjet_tst_128x256_64x4", 1000, 4000),
    event("nvjet_tst_128x256_64x4", 7000, 2000),
    event("void megatron_nuwa::walk<megatron_nuwa::Forward<64> >(Arguments)", 8000, 3000),
    event("elementwise_kernel<direct_copy(x)::[lambda()#3]::operator()[/b]>", 7500, 500),
    event("Memcpy HtoD (Pageable -> Device)", 10_500, 500, "gpu_memcpy"),
    {"name": "process_name", "ph": "M"},
]


def test_a_profile_adds_up_kernels_and_the_time_in_which_any_ran() -> None:
    profile = read_trace(TRACE)
    assert [(k.kind, k.calls, k.milliseconds) for k in profile.kernels] == [
        ("matrix products", 2, 6.0),
        ("nearby attention", 1, 3.0),
        ("copies", 1, 0.5),
        ("copies", 1, 0.5),
    ]
    assert profile.span_ms == pytest.approx(10)
    # From 1 to 5 ms and from 7 to 11; the copy ran beside attention.
    assert profile.busy_ms == pytest.approx(8)
    shown = StringIO()
    show_profile(Console(file=shown, width=200), profile, rows=3)
    assert "megatron_nuwa::walk" in shown.getvalue()
    assert "[lambda()#3]::operator()[/b]" in shown.getvalue()
    assert "Memcpy" not in shown.getvalue()


def test_a_trace_without_kernels_is_an_empty_profile() -> None:
    profile = read_trace([])
    assert (profile.kernels, profile.span_ms, profile.busy_ms) == ((), 0, 0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "other attention"),
        ("triton_red_fused__to_copy_add_native_layer_norm_backward_3", "compiled"),
        (
            "void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>",
            "element by element",
        ),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float>>", "reductions"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize("guess", [1, 5, 11, 12, 13, 17, 30, 150])
@pytest.mark.parametrize("most", [1, 2, 5, 11, 12, 16])
def test_the_largest_that_fits_is_found_from_any_guess(guess: int, most: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= most

    assert largest(fits, guess) == most
    assert len(tried) == len(set(tried)) <= 12
    if abs(guess - most) <= 1:
        assert len(tried) <= 4


def test_nothing_fits() -> None:
    assert largest(lambda number: False, 4) == 0


def test_the_largest_mix_is_found_and_steps_go_on_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that stands in for a GPU which holds five clips of a tiny model."""
    lone_process()
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 1 << 29))
    recipe = load_recipe(ROOT / "launch/recipes/nuwa_870m.yaml", SMALL)
    plan = StepPlan(recipe, ROOT / "ds_configs/zero1_bf16.json", DEVICES["cpu"])
    engine = real_step.single_engine(recipe, plan, torch.device("cpu"), micro_batches=3)
    forward = engine.model.cross_entropy.forward

    def limited(logits: Tensor, target: Tensor) -> Tensor:
        if len(target) > 5 and target.shape[1] == 6 * 6 * 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(logits, target)

    monkeypatch.setattr(engine.model.cross_entropy, "forward", limited)
    mix = Mix(clips=2, images=4, count=2)

    def step(batches: Sequence[TokenBatch]) -> float:
        return real_step._step(engine, batches).loss

    found = largest_mix(engine, plan, mix, step)
    assert found == Mix(clips=5, images=10, count=2)
    # What was tried out left no gradients: the next step is that of an engine of its own.
    batches = token_batches(plan.model, found.sizes(plan.model))
    losses = [step(batches) for _ in range(2)]
    other = real_step.single_engine(recipe, plan, torch.device("cpu"), micro_batches=3)
    real_step._step(other, token_batches(plan.model, mix.scaled(1).sizes(plan.model)))
    assert losses == [real_step._step(other, batches).loss for _ in range(2)]


def test_an_error_that_is_not_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def fails() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        fits_in_memory(fails)
