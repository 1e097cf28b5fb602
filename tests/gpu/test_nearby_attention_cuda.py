"""The CUDA backend on a GPU: right, the same on every run, and within PyTorch's rules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import cuda, nearby_attention
from megatron_nuwa.ops.tables import Geometry

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from geometries import attention, definition, geometries

REASON = (
    "no CUDA device here"
    if not torch.cuda.is_available()
    else cuda.why_not(torch.empty(1, 1, 1, 32, device="cuda"))
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=f"no CUDA backend: {REASON}"),
]

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
VIDEO = Geometry(Grid(21, 21, 10), Grid(21, 21, 10), Extent(7, 7, 7), True)


def random_call(
    geometry: Geometry, dtype: torch.dtype, size: int, seed: int, batch: int = 2, heads: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one call, not contiguous, that want gradients."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(cells: int) -> Tensor:
        shape = (batch, heads, cells, size)
        stored = torch.randn(shape, generator=generator, device="cuda").to(dtype)
        return stored.transpose(1, 2).requires_grad_()

    keys = geometry.context_grid.cells
    return random(geometry.grid.cells), random(keys), random(keys)


def call(
    geometry: Geometry, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    grid, context_grid, extent, causal = geometry
    return nearby_attention(
        query,
        key,
        value,
        grid=grid,
        context_grid=context_grid,
        extent=extent,
        causal=causal,
        context_mask=mask,
        backend="cuda",
    )


def check(geometry: Geometry, dtype: torch.dtype, size: int, seed: int, masked: bool) -> None:
    tensors = random_call(geometry, dtype, size, seed)
    shape = (tensors[0].shape[0], geometry.context_grid.cells)
    mask = torch.rand(shape, device="cuda") < 0.5 if masked else None
    output = call(geometry, *tensors, mask)
    grad = torch.randn_like(output)
    gradients = torch.autograd.grad(output, tensors, grad)

    wide = [t.detach().double().transpose(1, 2).requires_grad_() for t in tensors]
    seen = definition(geometry).cuda()
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    seen = seen.expand(*wide[0].shape[:3], seen.shape[-1])
    expected, _ = attention(*wide, seen, size**-0.5)
    expected_gradients = torch.autograd.grad(expected, wide, grad.double().transpose(1, 2))
    for mine, theirs in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        mine = mine.double().transpose(1, 2)
        assert torch.isfinite(mine).all()
        # A softmax over one key has a gradient that vanishes, and rounding that does not.
        scale = max(theirs.norm().item(), 0.1 * grad.double().norm().item())
        assert (mine - theirs).norm().item() <= TOLERANCES[dtype] * scale


@settings(max_examples=300, deadline=None)
@given(
    geometry=geometries(),
    dtype=st.sampled_from(list(TOLERANCES)),
    size=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
)
def test_outputs_and_gradients_equal_the_definition(
    geometry: Geometry, dtype: torch.dtype, size: int, seed: int, masked: bool
) -> None:
    check(geometry, dtype, size, seed, masked)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_a_whole_video_equals_the_definition(dtype: torch.dtype, size: int, causal: bool) -> None:
    check(VIDEO._replace(causal=causal), dtype, size, 1, masked=False)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    tensors = random_call(VIDEO, dtype, 64, 2, batch=4, heads=8)
    runs = []
    for _ in range(5):
        output = call(VIDEO, *tensors)
        runs.append((output, *torch.autograd.grad(output, tensors, torch.ones_like(output))))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_offsets_past_two_to_the_31() -> None:
    """The last batch item of tensors of more than 2³¹ numbers, against the same item alone."""
    heads, size = 16, 128
    batch = 2**31 // (VIDEO.grid.cells * heads * size) + 2
    shape = (batch, VIDEO.grid.cells, heads, size)
    torch.cuda.empty_cache()
    needed = 9 * 2 * batch * VIDEO.grid.cells * heads * size
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    assert tensors[0].numel() > 2**31
    for t in tensors:
        t.requires_grad_()
    output = call(VIDEO, *tensors)
    gradients = torch.autograd.grad(output, tensors, output)
    last = [t.detach()[-1:].clone().requires_grad_() for t in tensors]
    expected = call(VIDEO, *last)
    expected_gradients = torch.autograd.grad(expected, last, expected)
    for mine, theirs in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert torch.equal(mine[-1:], theirs)


def test_memory_is_that_of_inputs_outputs_and_gradients() -> None:
    tensors = [
        t.detach().contiguous().requires_grad_()
        for t in random_call(VIDEO, torch.bfloat16, 64, 3, batch=8, heads=20)
    ]
    call(VIDEO, *tensors).sum().backward()  # tables are made once
    for t in tensors:
        t.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - sum(t.nbytes for t in tensors)
    output = call(VIDEO, *tensors)
    output.backward(torch.empty_like(output))
    # Inputs, output, its gradient, and three gradients.
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * 8 * output.nbytes


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_opcheck(dtype: torch.dtype) -> None:
    geometry = Geometry(Grid(4, 4, 2), Grid(2, 3, 1), Extent(3, 1, 3), False)
    query, key, value = random_call(geometry, dtype, 32, 4)
    mask = torch.rand(2, 6, device="cuda") < 0.5
    settings_ = [list(geometry.grid), list(geometry.context_grid), [3, 1, 3], False, 0.5, "cuda"]
    torch.library.opcheck(
        torch.ops.megatron_nuwa.nearby_attention.default, (query, key, value, mask, *settings_)
    )


def test_compiles_without_graph_breaks() -> None:
    geometry = Geometry(Grid(4, 4, 2), Grid(4, 4, 2), Extent(3, 3, 1), True)
    tensors = random_call(geometry, torch.bfloat16, 64, 5)
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(geometry, *tensors), call(geometry, *tensors))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_masked_words_are_seen_by_the_kernels(is_compiled: bool) -> None:
    """A small padded context goes to the kernels by itself, in a compiled function, too."""
    geometry = Geometry(Grid(4, 4, 2), Grid(1, 1, 77), Extent(1, 1, None), False)
    tensors = random_call(geometry, torch.bfloat16, 64, 7)
    mask = torch.arange(77, device="cuda") < torch.tensor([[12], [0]], device="cuda")

    def by_itself(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nearby_attention(
            query,
            key,
            value,
            grid=geometry.grid,
            context_grid=geometry.context_grid,
            extent=geometry.extent,
            context_mask=mask,
        )

    function = torch.compile(by_itself, fullgraph=True) if is_compiled else by_itself
    assert torch.equal(function(*tensors), call(geometry, *tensors, mask))


def test_runs_on_the_current_stream() -> None:
    tensors = random_call(VIDEO, torch.bfloat16, 64, 6)
    expected = call(VIDEO, *tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [t.detach().clone() for t in tensors]
        output = call(VIDEO, *late)
    stream.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [(32, torch.float64, "float64"), (160, torch.float32, "head sizes up to 128")],
)
def test_a_call_it_cannot_take_is_refused_with_the_reason(
    size: int, dtype: torch.dtype, reason: str
) -> None:
    query = torch.zeros(1, 4, 1, size, dtype=dtype, device="cuda")
    with pytest.raises(ValueError, match=reason):
        nearby_attention(query, query, query, grid=(2, 2, 1), extent=(1, 1, 1), backend="cuda")
