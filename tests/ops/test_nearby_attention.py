"""The operator against its definition: brute force over cells, one softmax a query, in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LargestTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid, nearby_indices
from megatron_nuwa.ops import dense, gather, nearby_attention, reference
from megatron_nuwa.ops.tables import Geometry, dense_mask, key_table, query_table

CPU = torch.device("cpu")


def brute_force(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, mask: Tensor | None, scale: float
) -> Tensor:
    """One query at a time, from the definition of nearby; differentiable."""
    rows = []
    for n in range(geometry.grid.cells):
        near = nearby_indices(n, *geometry)
        heads = []
        for b in range(query.shape[0]):
            seen = [m for m in near if mask is None or bool(mask[b, m])]
            if not seen:
                heads.append(query[b, n] * 0)
                continue
            scores = torch.einsum("hd,mhd->hm", query[b, n], key[b, seen]) * scale
            heads.append(torch.einsum("hm,mhd->hd", scores.softmax(-1), value[b, seen]))
        rows.append(torch.stack(heads))
    return torch.stack(rows, 1)


sides = st.integers(1, 5)
widths = st.sampled_from([1, 3, 5, 7, 11, None])


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    grid = Grid(draw(sides), draw(sides), draw(st.integers(1, 4)))
    causal = draw(st.booleans())
    context = grid if causal else Grid(draw(sides), draw(sides), draw(st.integers(1, 4)))
    extent = Extent(draw(widths), draw(widths), draw(widths))
    return Geometry(grid, context, extent, causal)


def random_call(
    geometry: Geometry, seed: int, masked: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, size = 2, 2, 8

    def random(cells: int) -> Tensor:
        # Stored heads-first, so that what the operator gets is not contiguous.
        stored = torch.randn(batch, heads, cells, size, generator=generator, dtype=torch.float64)
        return stored.to(dtype).transpose(1, 2).requires_grad_()

    query, key, value = (
        random(geometry.grid.cells),
        random(geometry.context_grid.cells),
        random(geometry.context_grid.cells),
    )
    mask = torch.rand(batch, geometry.context_grid.cells, generator=generator) < 0.5
    return query, key, value, mask if masked else None


@settings(max_examples=150, deadline=None)
@given(geometry=geometries())
def test_tables_equal_the_definition(geometry: Geometry) -> None:
    keys, queries = key_table(geometry, CPU), query_table(geometry, CPU)
    expected = [nearby_indices(n, *geometry) for n in range(geometry.grid.cells)]
    assert [row[ok].tolist() for row, ok in zip(keys.index, keys.valid, strict=True)] == expected
    mirrored = [
        [n for n, seen in enumerate(expected) if m in seen]
        for m in range(geometry.context_grid.cells)
    ]
    assert [
        row[ok].tolist() for row, ok in zip(queries.index, queries.valid, strict=True)
    ] == mirrored
    mask = dense_mask(geometry, CPU)
    assert [row.nonzero().flatten().tolist() for row in mask] == expected
    assert geometry.sees_everything == bool(dense_mask(geometry._replace(causal=False), CPU).all())


@settings(max_examples=100, deadline=None)
@given(geometry=geometries(), seed=st.integers(0, 2**31), masked=st.booleans())
def test_outputs_and_gradients_equal_brute_force(
    geometry: Geometry, seed: int, masked: bool
) -> None:
    query, key, value, mask = random_call(geometry, seed, masked)
    expected = brute_force(query, key, value, geometry, mask, 0.3)
    grad = torch.randn_like(expected)
    # Where a mask hides every key, the brute force does not touch keys and values at all.
    expected_gradients = torch.autograd.grad(
        expected, (query, key, value), grad, allow_unused=True, materialize_grads=True
    )
    for backend in ("auto", "reference"):
        output = nearby_attention(
            query,
            key,
            value,
            grid=geometry.grid,
            context_grid=geometry.context_grid,
            extent=geometry.extent,
            causal=geometry.causal,
            context_mask=mask,
            scale=0.3,
            backend=backend,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
        gradients = torch.autograd.grad(output, (query, key, value), grad)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    geometry=geometries(),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
    loudness=st.sampled_from([1.0, 1e4]),
)
def test_gather_equals_dense(geometry: Geometry, seed: int, masked: bool, loudness: float) -> None:
    query, key, value, mask = random_call(geometry, seed, masked)
    if mask is not None:
        # What is not to be seen may score as high as it likes.
        key = torch.where(mask[..., None, None], key, key * loudness)
    with torch.no_grad():
        by_dense = dense.forward(query, key, value, mask, geometry, 0.3)
        by_gather = gather.forward(query, key, value, mask, geometry, 0.3)
        torch.testing.assert_close(by_gather, by_dense, rtol=1e-10, atol=1e-10)
        grad = torch.randn_like(query)
        arguments = (grad, query, key, value, mask, *by_dense, geometry, 0.3)
        torch.testing.assert_close(
            gather.backward(*arguments), dense.backward(*arguments), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_lower_precisions_stay_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    geometry = Geometry(Grid(7, 5, 4), Grid(7, 5, 4), Extent(3, 3, 3), True)
    query, key, value, _ = random_call(geometry, 3, False, dtype)
    wide = [t.detach().double().requires_grad_() for t in (query, key, value)]
    arguments = {"grid": geometry.grid, "extent": geometry.extent, "causal": True}
    output, expected = (
        nearby_attention(query, key, value, **arguments),
        nearby_attention(*wide, **arguments),
    )
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, (query, key, value), grad.to(dtype))
    expected_gradients = torch.autograd.grad(expected, wide, grad.to(dtype).double())
    for ours, theirs in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance


def test_gather_memory_grows_with_the_window_not_the_context() -> None:
    """At the paper's video size a dense score matrix would take 4,410² · 4 bytes = 78 MB a head."""
    geometry = Geometry(Grid(21, 21, 10), Grid(21, 21, 10), Extent(3, 3, 3), True)
    query = torch.randn(1, geometry.grid.cells, 1, 16)
    with LargestTensor() as largest:
        output, log_sum = gather.forward(query, query, query, None, geometry, 0.25)
        gather.backward(output, query, query, query, None, output, log_sum, geometry, 0.25)
    assert largest.cells <= geometry.grid.cells * 27


@pytest.mark.parametrize("form", [dense, gather])
def test_gradcheck(form: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_cheaper_form", lambda *_: form)
    geometry = Geometry(Grid(3, 2, 3), Grid(3, 2, 3), Extent(3, 1, 3), True)
    query, key, value, mask = random_call(geometry, 5, True)
    assert torch.autograd.gradcheck(
        lambda *qkv: nearby_attention(
            *qkv, grid=geometry.grid, extent=geometry.extent, causal=True, context_mask=mask
        ),
        (query, key, value),
    )


@pytest.mark.parametrize("context_grid", [(4, 4, 2), (2, 3, 1)])
def test_opcheck(context_grid: tuple[int, int, int]) -> None:
    geometry = Geometry(Grid(4, 4, 2), Grid(*context_grid), Extent(3, 1, 3), False)
    query, key, value, mask = random_call(geometry, 5, True, torch.float32)
    torch.library.opcheck(
        torch.ops.megatron_nuwa.nearby_attention.default,
        (
            query,
            key,
            value,
            mask,
            [4, 4, 2],
            list(context_grid),
            [3, 1, 3],
            False,
            0.5,
            "reference",
        ),
    )


def test_compiles_without_graph_breaks() -> None:
    geometry = Geometry(Grid(4, 4, 2), Grid(4, 4, 2), Extent(3, 3, 1), True)
    query, key, value, _ = random_call(geometry, 5, False, torch.float32)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nearby_attention(
            query, key, value, grid=(4, 4, 2), extent=(3, 3, 1), causal=True
        ).square()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), call(query, key, value))


def test_compiles_over_a_small_masked_context() -> None:
    query, key = torch.randn(1, 8, 2, 32).bfloat16(), torch.randn(1, 5, 2, 32).bfloat16()
    mask = torch.tensor([[True] * 3 + [False] * 2])

    def call(query: Tensor, key: Tensor) -> Tensor:
        return nearby_attention(
            query,
            key,
            key,
            grid=(2, 2, 2),
            context_grid=(1, 1, 5),
            extent=(1, 1, None),
            context_mask=mask,
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), call(query, key))


def test_autocast_computes_in_its_dtype() -> None:
    query = torch.randn(1, 8, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = nearby_attention(query, query, query, grid=(2, 2, 2), extent=(1, 3, 1))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extent", [(1, 3, 1), (3, 3, 3)])
def test_autocast_narrows_what_goes_in_and_no_sum(
    dtype: torch.dtype, extent: tuple[int, int, int]
) -> None:
    """Scores of these tokens are beyond float16 before they are scaled."""
    tokens = [(300 * torch.randn(1, 8, 2, 8)).to(dtype) for _ in range(3)]

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in (query, key, value)]
        output = nearby_attention(
            *inputs, grid=(2, 2, 2), extent=extent, scale=1e-3, backend="reference"
        )
        return output, *torch.autograd.grad(output.sum(), inputs)

    expected = call(*tokens)
    with torch.autocast("cpu", dtype=dtype):
        found = call(*tokens)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", [dense, gather])
def test_padding_tokens_may_hold_anything(
    form: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_cheaper_form", lambda *_: form)
    _with_a_nan_in_padding(extent=(3, 3, 1), backend="reference")


@pytest.mark.parametrize("causal", [False, True])
def test_padding_tokens_may_hold_anything_where_all_is_to_be_seen(causal: bool) -> None:
    _with_a_nan_in_padding(extent=(None, None, None), causal=causal)


def _with_a_nan_in_padding(**settings: Any) -> None:
    query, key, value = (torch.randn(2, 12, 2, 8) for _ in range(3))
    mask = torch.rand(2, 12) < 0.5
    results = []
    for padding in (0.0, torch.nan):
        inputs = [query, *(t.masked_fill(~mask[..., None, None], padding) for t in (key, value))]
        inputs = [t.detach().requires_grad_() for t in inputs]
        output = nearby_attention(*inputs, grid=(2, 3, 2), context_mask=mask, **settings)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for zeros, nans in zip(*results, strict=True):
        assert torch.equal(zeros, nans)


@pytest.mark.parametrize("extent", [(1, 3, 1), (None, None, None)])
def test_autocast_leaves_float64_as_pytorch_does(extent: tuple[int | None, ...]) -> None:
    query = torch.randn(1, 8, 2, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = nearby_attention(query, query, query, grid=(2, 2, 2), extent=extent)
    assert output.dtype == torch.float64


@pytest.mark.parametrize("extent", [(1, 3, 1), (None, None, None)])
def test_forward_mode_is_refused_instead_of_having_no_slope(extent: tuple[int | None, ...]) -> None:
    query = torch.randn(1, 8, 2, 8)

    def attend(key: torch.Tensor) -> torch.Tensor:
        return nearby_attention(query, key, query, grid=(2, 2, 2), extent=extent)

    with pytest.raises(NotImplementedError, match="forward-mode derivative, and key asks"):
        torch.func.jvp(attend, (query,), (query,))


def test_tensors_without_storage_have_a_shape() -> None:
    query = torch.empty(1, 8, 2, 8, device="meta")
    output = nearby_attention(query, query, query, grid=(2, 2, 2), extent=(1, 3, 1))
    assert output.shape == query.shape


def test_query_without_keys_gives_zeros_and_no_gradient() -> None:
    for extent in ((1, 1, 1), (None, None, None)):
        query = torch.randn(2, 4, 1, 8, requires_grad=True)
        mask = torch.tensor([[True] * 4, [False] * 4])
        output = nearby_attention(
            query, query, query, grid=(2, 2, 1), extent=extent, context_mask=mask
        )
        output.sum().backward()
        assert torch.equal(output[1], torch.zeros(4, 1, 8))
        assert query.grad is not None
        assert torch.isfinite(query.grad).all()
        assert torch.equal(query.grad[1], torch.zeros(4, 1, 8))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"grid": (2, 2)}, "grid"),
        ({"grid": (2, 0, 1)}, "grid"),
        ({"grid": (3, 2, 1)}, "query"),
        ({"extent": (2, 3, 1)}, "extent"),
        ({"extent": (3, 3)}, "extent"),
        ({"context_grid": (1, 2, 1)}, "key"),
        ({"context_grid": (2, 2, 1), "causal": True, "grid": (4, 1, 1)}, "causal"),
        ({"value": torch.zeros(1, 4, 2, 4)}, "value"),
        ({"key": torch.zeros(1, 4, 1, 4, dtype=torch.float64)}, "key"),
        ({"query": torch.zeros(4, 1, 4)}, "query"),
        ({"context_mask": torch.ones(1, 3, dtype=torch.bool)}, "context_mask"),
        ({"context_mask": torch.ones(1, 4)}, "context_mask"),
        ({"backend": "gpu"}, "backend"),
        ({"grid": 2}, "grid"),
        ({"extent": None}, "extent"),
        ({"scale": "small"}, "scale"),
        ({"causal": "no"}, "causal"),
        ({"query": [[0.0]]}, "query"),
        ({"context_mask": [True]}, "context_mask"),
        ({"context_mask": np.ones((1, 4), bool)}, "context_mask"),
        (dict.fromkeys(("query", "key", "value"), torch.zeros(1, 4, 1, 0)), "query"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], name: str) -> None:
    tensor = torch.zeros(1, 4, 1, 4)
    call = {"query": tensor, "key": tensor, "value": tensor, "grid": (2, 2, 1), "extent": (3, 3, 1)}
    with pytest.raises((ValueError, TypeError), match=f"^{name} "):
        nearby_attention(**{**call, **change})  # type: ignore[arg-type]
