"""The CUDA kernels' own source, run thread by thread on a simulated device, in bounds and right."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from geometries import attention, definition, geometries
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.ops.warp_tables import chunk_columns, row_tables, warp_tables

CPU = torch.device("cpu")
HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "megatron_nuwa/ops/csrc/cuda"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor | None) -> Array:
        if tensor is None:
            return cls(None, 0)
        assert tensor.is_contiguous()
        return cls(tensor.data_ptr(), tensor.numel() * tensor.element_size())


class Call(ctypes.Structure):
    """`Call` of simulate.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "heads", "queries", "keys", "blocks", "mirrored_blocks")
        ),
        ("scale", ctypes.c_float),
        ("at_end", ctypes.c_int32),
        *(
            (name, Array)
            for name in (
                *("query", "key", "value", "mask", "grad", "output", "log_sum", "statistics"),
                *("grad_query", "grad_key", "grad_value"),
            )
        ),
        ("tables", Array * 6),
        ("mirrored", Array * 6),
    )


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the simulated device with")
    library = tmp_path_factory.mktemp("simulator") / "simulator.so"
    source = HERE / "cuda_simulator"
    # As on the device, the same memory is read as scalars and as vectors.
    flags = ["-std=c++20", "-O2", "-w", "-fno-strict-aliasing", "-shared", "-fPIC"]
    flags += [f"-I{source}", f"-I{KERNELS}"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source / "simulate.cpp")], check=True)
    return ctypes.CDLL(str(library))


def simulate(
    simulator: ctypes.CDLL,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    scale: float,
    at_end: bool,
) -> tuple[Tensor, ...]:
    """Output, log_sum and three gradients, as the library's operators give them."""
    batch, queries, heads, size = query.shape
    if query.dtype == torch.float32:
        tables: list[Sequence[Tensor]] = [row_tables(geometry, m, CPU) for m in (False, True)]
    else:
        chunk = chunk_columns(size)
        tables = [warp_tables(geometry, m, chunk, CPU) for m in (False, True)]
    results = [torch.empty_like(t) for t in (query, query, key, value)]
    log_sum = torch.empty(batch, heads, queries)
    statistics = torch.empty(batch, heads, queries, 2)
    output, *gradients = results
    call = Call(
        *(batch, heads, queries, key.shape[1], *(len(t[0]) - 1 for t in tables), scale, at_end),
        *map(Array.of, (query, key, value, mask, grad, output, log_sum, statistics, *gradients)),
        *((Array * 6)(*map(Array.of, t)) for t in tables),
    )
    dtype = "float" if query.dtype == torch.float32 else "bf16"
    getattr(simulator, f"simulate_{dtype}_{size}")(ctypes.byref(call))
    return output, log_sum, *gradients


def check(
    simulator: ctypes.CDLL,
    geometry: Geometry,
    dtype: torch.dtype,
    size: int,
    seed: int,
    masked: bool,
    strength: float,
    images: tuple[int, int],
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(cells: int) -> Tensor:
        shape = (images[0], cells, images[1], size)
        return torch.randn(shape, generator=generator).to(dtype)

    queries, keys = geometry.grid.cells, geometry.context_grid.cells
    query, key, value, grad = (random(n) for n in (queries, keys, keys, queries))
    mask = torch.rand(images[0], keys, generator=generator) < 0.5 if masked else None
    scale = strength * size**-0.5
    ours = simulate(
        simulator, query, key, value, grad, mask, geometry, scale, at_end=bool(seed % 2)
    )

    wide = [t.double().transpose(1, 2).requires_grad_() for t in (query, key, value)]
    seen = definition(geometry)
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    seen = seen.expand(images[0], images[1], queries, keys)
    output, log_sum = attention(*wide, seen, scale)
    gradients = torch.autograd.grad(output, wide, grad.double().transpose(1, 2))
    torch.testing.assert_close(ours[1].double(), log_sum.detach(), rtol=1e-5, atol=1e-4)
    sizes = [
        t.norm() for t in (output, *before_cancellation(wide, seen, grad, scale), gradients[2])
    ]
    for mine, expected, norm in zip((ours[0], *ours[2:]), (output, *gradients), sizes, strict=True):
        mine = mine.double().transpose(1, 2)
        assert torch.isfinite(mine).all()
        assert (mine - expected).norm() <= TOLERANCES[dtype] * norm


def before_cancellation(
    wide: list[Tensor], seen: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The first of the two terms whose difference is the gradient of queries, and of keys.

    Where a softmax has all but one weight near zero the difference vanishes, and has no digits
    of its own to compare.
    """
    query, key, value = (t.detach() for t in wide)
    weights, _ = attention(query, key, torch.eye(key.shape[2]).double(), seen, scale)
    changes = weights * (grad.double().transpose(1, 2) @ value.mT) * scale
    return changes @ key, changes.mT @ query


@settings(max_examples=40, deadline=None)
@given(
    geometry=geometries().filter(lambda g: g.grid.cells * g.context_grid.cells < 40_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
    strength=st.sampled_from([1.0, 4.0]),
)
def test_kernels_equal_the_definition(
    simulator: ctypes.CDLL,
    geometry: Geometry,
    dtype: torch.dtype,
    size: int,
    seed: int,
    masked: bool,
    strength: float,
) -> None:
    check(simulator, geometry, dtype, size, seed, masked, strength, images=(1, 2))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_kernels_of_many_chunks_equal_the_definition(
    simulator: ctypes.CDLL, size: int, causal: bool
) -> None:
    grid = Grid(7, 9, 6)
    geometry = Geometry(grid, grid, Extent(7, 7, 7), causal)
    check(simulator, geometry, torch.bfloat16, size, 3, True, 4.0, images=(1, 1))


def test_padding_tokens_may_hold_anything(simulator: ctypes.CDLL) -> None:
    """What lies in a masked context token reaches no output, were it NaN."""
    grid = Grid(3, 3, 1)
    geometry = Geometry(grid, grid, Extent(3, 3, 1), False)
    query, key, value, grad = torch.randn(4, 1, 9, 1, 32).bfloat16()
    mask = torch.tensor([[True] * 5 + [False] * 4])
    call = (mask, geometry, 0.2, True)
    clean = simulate(simulator, query, key, value, grad, *call)
    key[0, 5:], value[0, 5:] = torch.nan, torch.inf
    for expected, ours in zip(
        clean, simulate(simulator, query, key, value, grad, *call), strict=True
    ):
        assert torch.equal(expected, ours)
