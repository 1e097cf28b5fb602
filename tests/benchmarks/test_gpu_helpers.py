"""What the benchmarks of a GPU work out without one: kernels of a trace, the largest that fits."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from benchmarks.harness.kernels import kind_of, read_trace, show_profile
from benchmarks.harness.largest import largest


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


@pytest.mark.parametrize("guess", [1, 5, 11, 12, 13, 17, 30])
@pytest.mark.parametrize("most", [1, 2, 11, 12, 16])
def test_the_largest_that_fits_is_found_from_any_near_guess(guess: int, most: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= most

    found = largest(fits, guess)
    assert len(tried) == len(set(tried)) <= 8
    if abs(guess - most) <= 3:
        assert found == most
    # A guess far off costs more tries than there are, but what is found was seen to fit.
    assert found == 0 or (found in tried and found <= most)


def test_nothing_fits() -> None:
    assert largest(lambda number: False, 4) == 0
