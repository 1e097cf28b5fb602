"""Decoding steps against the rows of the whole operator, with exactly the cache that they need."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import RingCache, cpu, nearby_attention, nearby_attention_step
from megatron_nuwa.ops.native import why_missing
from megatron_nuwa.ops.step import ring_slots

BACKENDS = ["reference"] if why_missing("cpu") else ["reference", "cpu"]
sides = st.integers(1, 5)
widths = st.sampled_from([1, 3, 5, 7, None])
grids = st.builds(Grid, sides, sides, st.integers(1, 6))
extents = st.builds(Extent, widths, widths, widths)


def random(generator: torch.Generator, cells: int, size: int = 16) -> Tensor:
    return torch.randn(2, cells, 3, size, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120, deadline=None)
@given(grid=grids, extent=extents, seed=st.integers(0, 2**31), blocks=st.integers(1, 40))
def test_a_ring_of_frames_gives_what_the_whole_past_gives(
    backend: str, grid: Grid, extent: Extent, seed: int, blocks: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (random(generator, grid.cells) for _ in range(3))
    expected = nearby_attention(
        query, key, value, grid=grid, extent=extent, causal=True, backend="reference"
    )
    cache = RingCache(2, 3, 16, grid=grid, extent=extent)
    frames = grid.s if extent.s is None else min(grid.s, extent.s // 2 + 1)
    assert cache.keys.shape[1] == ring_slots(grid, extent) == frames * grid.h * grid.w
    outputs = []
    while cache.position < grid.cells:
        most = min(blocks, grid.cells - cache.position)
        steps = int(torch.randint(1, most + 1, (), generator=generator))
        here = slice(cache.position, cache.position + steps)
        outputs.append(cache.attend(query[:, here], key[:, here], value[:, here], backend=backend))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120, deadline=None)
@given(
    grid=grids,
    context_grid=grids,
    extent=extents,
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
)
def test_steps_over_a_context_equal_the_rows_of_the_operator(
    backend: str, grid: Grid, context_grid: Grid, extent: Extent, seed: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = random(generator, grid.cells)
    key, value = (random(generator, context_grid.cells) for _ in range(2))
    mask = torch.rand(2, context_grid.cells, generator=generator) < 0.5 if masked else None
    shared = {"grid": grid, "context_grid": context_grid, "extent": extent, "context_mask": mask}
    expected = nearby_attention(query, key, value, **shared, backend="reference")  # type: ignore[arg-type]
    position = int(torch.randint(grid.cells, (), generator=generator))
    steps = int(torch.randint(1, min(grid.cells - position, 9) + 1, (), generator=generator))
    output = nearby_attention_step(
        query[:, position : position + steps],
        key,
        value,
        position=position,
        backend=backend,
        **shared,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(
        output, expected[:, position : position + steps], rtol=1e-5, atol=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(grid=grids, extent=extents, seed=st.integers(0, 2**31))
def test_what_a_ring_still_holds_from_older_frames_is_not_seen(
    grid: Grid, extent: Extent, seed: int
) -> None:
    """A cache of every cell, with NaN where a ring has forgotten or does not yet know."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (random(generator, grid.cells) for _ in range(3))
    position = int(torch.randint(grid.cells, (), generator=generator))
    frame, slots = grid.h * grid.w, ring_slots(grid, extent)
    oldest = max(0, (position // frame + 1) * frame - slots)
    assume(oldest > 0 or position < grid.cells - 1)
    expected = nearby_attention(
        query, key, value, grid=grid, extent=extent, causal=True, backend="reference"
    )[:, position]
    key, value = key.clone(), value.clone()
    for tensor in (key, value):
        tensor[:, :oldest] = torch.nan
        tensor[:, position + 1 :] = torch.nan
    for backend in BACKENDS:
        output = nearby_attention_step(
            query[:, position : position + 1],
            key,
            value,
            position=position,
            grid=grid,
            extent=extent,
            backend=backend,
        )[:, 0]
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (random(generator, 60).to(dtype) for _ in range(3))
    expected = nearby_attention(
        query.double(), key.double(), value.double(), grid=(4, 5, 3), extent=(3, 3, 3), causal=True
    )
    cache = RingCache(2, 3, 16, grid=(4, 5, 3), extent=(3, 3, 3), dtype=dtype)
    output = cache.attend(query, key, value)
    assert output.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (output.double() - expected).norm() <= tolerance * expected.norm()


def test_gradients_come_from_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (random(generator, 20).requires_grad_() for _ in range(3))
    whole = nearby_attention(query, key, value, grid=(4, 5, 1), extent=(3, 3, 1), causal=True)
    step = nearby_attention_step(
        query[:, 7:9], key, value, position=7, grid=(4, 5, 1), extent=(3, 3, 1)
    )
    expected = torch.autograd.grad(whole[:, 7:9].square().sum(), (query, key, value))
    ours = torch.autograd.grad(step.square().sum(), (query, key, value))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("cpu" not in BACKENDS, reason=f"no C++ kernels here: {why_missing('cpu')}")
@pytest.mark.parametrize("instructions", cpu.available_instruction_sets())
def test_every_instruction_set(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.INSTRUCTION_SET_VARIABLE, instructions)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (random(generator, 100, size=24) for _ in range(3))
    outputs = []
    for backend in BACKENDS:
        cache = RingCache(2, 3, 24, grid=(5, 5, 4), extent=(3, 3, 3))
        steps = [
            cache.attend(
                query[:, n : n + 1], key[:, n : n + 1], value[:, n : n + 1], backend=backend
            )
            for n in range(100)
        ]
        outputs.append(torch.cat(steps, 1))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"query": torch.zeros(1, 2, 8)}, "query"),
        ({"query": torch.zeros(1, 1, 2, 8, dtype=torch.int64)}, "query"),
        ({"key_cache": torch.zeros(1, 12, 2, 8, dtype=torch.float64)}, "key_cache"),
        ({"value_cache": torch.zeros(1, 12, 1, 8)}, "value_cache"),
        ({"position": -1}, "position"),
        ({"position": 18}, "position"),
        ({"grid": (3, 2)}, "grid"),
        ({"extent": (3, 2, 3)}, "extent"),
        ({"context_grid": (3, 2, 1)}, "key_cache"),
        ({"context_mask": torch.ones(1, 12)}, "context_mask"),
        ({"context_mask": torch.ones(1, 11, dtype=torch.bool)}, "context_mask"),
        ({"backend": "cuda"}, "backend"),
        ({"query": torch.zeros(1, 9, 2, 8), "position": 7}, "key_cache"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], name: str) -> None:
    cache = torch.zeros(1, 12, 2, 8)
    call = {
        "query": torch.zeros(1, 1, 2, 8),
        "key_cache": cache,
        "value_cache": cache,
        "position": 7,
        "grid": (3, 2, 3),
        "extent": (3, 3, 3),
    }
    nearby_attention_step(**call)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match=f"^{name} "):
        nearby_attention_step(**{**call, **change})  # type: ignore[arg-type]


def test_a_ring_ends_with_its_grid() -> None:
    cache = RingCache(1, 1, 16, grid=(2, 2, 1), extent=(3, 3, 1))
    step = torch.zeros(1, 3, 1, 16)
    cache.attend(step, step, step)
    with pytest.raises(ValueError, match=r"^query must have at most 1 steps"):
        cache.attend(step, step, step)
