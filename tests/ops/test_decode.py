"""Decoding a few cells at a time against the rows of the whole operator, on both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import cpu, nearby_attention
from megatron_nuwa.ops.decode import (
    CellAttention,
    CellLists,
    KernelAttention,
    KeyValueCache,
    Span,
    StaticAttention,
    ring_slots,
)
from megatron_nuwa.ops.native import why_missing
from megatron_nuwa.ops.tables import Geometry

WAYS: list[type[CellAttention]] = [StaticAttention]
if not why_missing("cpu"):
    WAYS.append(KernelAttention)
PARTS, PART = 3, 1
sides = st.integers(1, 5)
widths = st.sampled_from([1, 3, 5, 7, None])
grids = st.builds(Grid, sides, sides, st.integers(1, 6))
extents = st.builds(Extent, widths, widths, widths)


def random(generator: torch.Generator, cells: int, size: int = 16) -> Tensor:
    return torch.randn(2, cells, 3, size, generator=generator)


def spans(grid: Grid, generator: torch.Generator, most: int) -> list[Span]:
    """Blocks of random lengths, none across the end of a frame."""
    result, first, frame = [], 0, grid.h * grid.w
    while first < grid.cells:
        steps = int(torch.randint(1, most + 1, (), generator=generator))
        steps = min(steps, (first // frame + 1) * frame - first)
        result.append(Span(first, steps))
        first += steps
    return result


def attended(
    attention: CellAttention, query: Tensor, cache: KeyValueCache, span: Span, on_device: bool
) -> Tensor:
    """The rows of one block; queries lie among others, as a fused projection leaves them."""
    here = query[:, span.first : span.first + span.steps]
    fused = torch.randn(2, span.steps, PARTS, 3, query.shape[-1]).to(query)
    fused[:, :, PART] = here
    out = torch.zeros_like(fused)
    place = torch.arange(span.first, span.first + span.steps) if on_device else span
    attention.go_to(place)
    attention.attend(fused.flatten(1, 2), cache, out.flatten(1, 2))
    assert not out[:, :, [0, 2]].any()
    return out[:, :, PART]


def decoded(
    way: type[CellAttention], lists: CellLists, tensors: tuple[Tensor, ...], blocks: list[Span]
) -> Tensor:
    query, key, value = tensors
    cache = KeyValueCache.empty(query, 2, lists.slots, 3, query.shape[-1])
    attention = way(lists, None, query.shape[-1] ** -0.5, PARTS, PART)
    outputs = []
    for number, span in enumerate(blocks):
        here = slice(span.first, span.first + span.steps)
        on_device = way is StaticAttention and number % 2 == 0
        place = torch.arange(here.start, here.stop) if on_device else span
        cache.write(torch.stack([key[:, here], value[:, here]]), lists.slots_of(place))
        outputs.append(attended(attention, query, cache, span, on_device))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=80, deadline=None)
@given(grid=grids, extent=extents, seed=st.integers(0, 2**31), most=st.integers(1, 30))
def test_a_ring_of_frames_gives_what_the_whole_past_gives(
    way: type[CellAttention], grid: Grid, extent: Extent, seed: int, most: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(random(generator, grid.cells) for _ in range(3))
    expected = nearby_attention(
        *tensors, grid=grid, extent=extent, causal=True, backend="reference"
    )
    lists = CellLists.nearby(Geometry(grid, grid, extent, True))
    frames = grid.s if extent.s is None else min(grid.s, extent.s // 2 + 1)
    assert lists.slots == ring_slots(grid, extent) == frames * grid.h * grid.w
    output = decoded(way, lists, tensors, spans(grid, generator, most))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=80, deadline=None)
@given(
    grid=grids,
    context_grid=grids,
    extent=extents,
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
)
def test_steps_over_a_context_equal_the_rows_of_the_operator(
    way: type[CellAttention],
    grid: Grid,
    context_grid: Grid,
    extent: Extent,
    seed: int,
    masked: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = random(generator, grid.cells)
    key, value = (random(generator, context_grid.cells) for _ in range(2))
    mask = torch.rand(2, context_grid.cells, generator=generator) < 0.5 if masked else None
    expected = nearby_attention(
        query,
        key,
        value,
        grid=grid,
        context_grid=context_grid,
        extent=extent,
        context_mask=mask,
        backend="reference",
    )
    attention = way(
        CellLists.nearby(Geometry(grid, context_grid, extent, False)), mask, 0.25, PARTS, PART
    )
    cache = KeyValueCache(torch.stack([key, value]))
    for span in spans(grid, generator, 9):
        here = slice(span.first, span.first + span.steps)
        output = attended(attention, query, cache, span, way is StaticAttention)
        torch.testing.assert_close(output, expected[:, here], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(KernelAttention not in WAYS, reason=f"no C++ kernels: {why_missing('cpu')}")
@pytest.mark.parametrize("instructions", cpu.available_instruction_sets())
@pytest.mark.parametrize("extent", [Extent(3, 3, 3), Extent(None, None, None)], ids=str)
def test_the_kernel_gives_a_cell_the_same_bits_in_every_block_and_batch(
    instructions: str, extent: Extent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.INSTRUCTION_SET_VARIABLE, instructions)
    generator = torch.Generator().manual_seed(1)
    grid = Grid(5, 5, 4)
    tensors = tuple(random(generator, grid.cells, size=32) for _ in range(3))
    lists = CellLists.nearby(Geometry(grid, grid, extent, True))
    one_by_one = decoded(KernelAttention, lists, tensors, [Span(n, 1) for n in range(100)])
    in_blocks = decoded(KernelAttention, lists, tensors, spans(grid, generator, 25))
    swapped = tuple(t.flip(0) for t in tensors)
    other_places = decoded(KernelAttention, lists, swapped, spans(grid, generator, 7)).flip(0)
    expected = nearby_attention(*tensors, grid=grid, extent=extent, causal=True)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(one_by_one, in_blocks)
    assert torch.equal(one_by_one, other_places)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(way: type[CellAttention], dtype: torch.dtype) -> None:
    if way is KernelAttention and dtype not in cpu.DTYPES:
        pytest.skip("goes the static way")
    generator = torch.Generator().manual_seed(1)
    tensors = tuple(random(generator, 60).to(dtype) for _ in range(3))
    query, key, value = (tensor.double() for tensor in tensors)
    grid, extent = Grid(4, 5, 3), Extent(3, 3, 3)
    expected = nearby_attention(query, key, value, grid=grid, extent=extent, causal=True)
    lists = CellLists.nearby(Geometry(grid, grid, extent, True))
    output = decoded(way, lists, tensors, [Span(n, 1) for n in range(60)])
    assert output.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (output.double() - expected).norm() <= tolerance * expected.norm()
