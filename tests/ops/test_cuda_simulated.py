"""The CUDA kernels' own source, run thread by thread on a simulated device, in bounds and right."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from geometries import attention, definition, geometries
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_kernels import compiled_simulator, simulate, tables_of
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.kernel_layouts import CANDIDATES, Candidate, Layout
from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import cuda, nearby_attention
from megatron_nuwa.ops.tables import Geometry


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled_simulator(tmp_path_factory.mktemp("simulator"))


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


class SimulatedOperators:
    """The operators of _native_cuda.so, by the simulator."""

    def __init__(self, simulator: ctypes.CDLL) -> None:
        self.simulator = simulator

    def cuda_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        tables: list[Tensor],
        scale: float,
    ) -> tuple[Tensor, ...]:
        # The backward kernels run too; that their sums come out as zeros is not looked at.
        every = (tables, *tables_of(self.geometry, query)[1:])
        grad = torch.zeros_like(query)
        return simulate(self.simulator, query, key, value, grad, mask, every, scale)[:2]

    def cuda_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        output: Tensor,
        log_sum: Tensor,
        tables: list[Tensor],
        mirrored: list[Tensor],
        scale: float,
    ) -> tuple[Tensor, ...]:
        every = (tables_of(self.geometry, query)[0], tables, mirrored)
        results = simulate(self.simulator, query, key, value, grad, mask, every, scale)
        assert torch.equal(results[0], output)
        assert torch.equal(results[1], log_sum)
        return results[2:]

    geometry: Geometry


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
        simulator,
        *(query, key, value, grad, mask, tables_of(geometry, query), scale),
        at_end=bool(seed % 2),
        pace=seed,
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


calls = given(
    call=st.fixed_dictionaries(
        {
            "geometry": geometries().filter(lambda g: g.grid.cells * g.context_grid.cells < 40_000),
            "dtype": st.sampled_from(list(TOLERANCES)),
            "size": st.sampled_from([32, 64, 128]),
            "seed": st.integers(0, 2**31),
            "masked": st.booleans(),
            "strength": st.sampled_from([1.0, 4.0]),
        }
    )
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@calls
def test_kernels_equal_the_definition_in_many_geometries(
    simulator: ctypes.CDLL, call: dict[str, Any]
) -> None:
    check(simulator, **call, images=(2, 1))


@settings(max_examples=25, deadline=None)
@calls
def test_kernels_equal_the_definition(simulator: ctypes.CDLL, call: dict[str, Any]) -> None:
    check(simulator, **call, images=(1, 2))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_kernels_of_many_chunks_equal_the_definition(
    simulator: ctypes.CDLL, size: int, causal: bool
) -> None:
    grid = Grid(7, 9, 6)
    geometry = Geometry(grid, grid, Extent(7, 7, 7), causal)
    check(simulator, geometry, torch.bfloat16, size, 3, True, 4.0, images=(1, 1))


@pytest.mark.parametrize("seed", range(4))
def test_items_may_be_handed_out_in_any_way(simulator: ctypes.CDLL, seed: int) -> None:
    """To teams that get many, one or none, in any order: the results have the same bits."""
    grid, generator = Grid(7, 9, 6), torch.Generator().manual_seed(seed)
    geometry = Geometry(grid, grid, Extent(3, 3, 3), True)
    query, key, value, grad = torch.randn(4, 2, grid.cells, 3, 64, generator=generator).bfloat16()
    tables = tables_of(geometry, query)
    expected = simulate(simulator, query, key, value, grad, None, tables, 0.2)
    for of_pass in tables:
        items = int(of_pass[-1].max()) + 1
        of_teams: list[list[int]] = [[] for _ in range(of_pass[-1].shape[1])]
        for item in torch.randperm(items, generator=generator).tolist():
            of_teams[len(of_teams) - 1 - min(item % 7, len(of_teams) - 2)].append(item)
        rounds = [torch.tensor(own, dtype=torch.int32) for own in of_teams]
        padded = pad_sequence(rounds, padding_value=-1)
        of_pass[-1] = F.pad(padded, (0, 0, 0, 2), value=-1)
    ours = simulate(simulator, query, key, value, grad, None, tables, 0.2, pace=seed)
    for mine, of_schedule in zip(ours, expected, strict=True):
        assert torch.equal(mine, of_schedule)


def test_items_of_a_larger_batch_are_nobodys(simulator: ctypes.CDLL) -> None:
    """A schedule that does not fit the tensors has nothing read or written beyond them."""
    grid = Grid(5, 7, 3)
    geometry = Geometry(grid, grid, Extent(3, 3, 3), True)
    query, key, value, grad = torch.randn(4, 2, grid.cells, 2, 64).bfloat16()
    for_one, for_two = tables_of(geometry, query[:1]), tables_of(geometry, query)
    # All that belongs to the first batch item, in the order of two.
    one = [t[:1].contiguous() for t in (query, key, value, grad)]
    expected = simulate(simulator, *one, None, for_one, 0.2)
    ends_early = [
        [*own[:-1], _without_gaps(of_two[-1])] for own, of_two in zip(for_one, for_two, strict=True)
    ]
    ours = simulate(simulator, *one, None, ends_early, 0.2)
    for mine, of_one in zip(ours, expected, strict=True):
        assert torch.equal(mine, of_one)


def _without_gaps(schedule: Tensor) -> Tensor:
    """Each team's items in ascending order, so that those of later batch items come last."""
    unsigned = schedule.long() & 0xFFFFFFFF
    return unsigned.sort(0).values.to(torch.uint32).view(torch.int32)


# Columns, or in the mirrored pass rows, that go round the ring twice and more.
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("frames", [(1, 8), (8, 1)])
def test_kernels_of_many_rounds_equal_the_definition(
    simulator: ctypes.CDLL, size: int, frames: tuple[int, int]
) -> None:
    grid, context = (Grid(9, 11, s) for s in frames)
    geometry = Geometry(grid, context, Extent(None, None, None), False)
    check(simulator, geometry, torch.float16, size, 6, True, 4.0, images=(1, 1))


def test_kernels_of_a_device_with_less_shared_memory_equal_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = compiled_simulator(tmp_path, "-DMEGATRON_NUWA_SMALL")
    monkeypatch.setattr(cuda, "_is_large", lambda device: False)
    grid = Grid(7, 9, 6)
    for size in (32, 64, 128):
        for causal in (True, False):
            geometry = Geometry(grid, grid, Extent(7, 7, 7), causal)
            check(smaller, geometry, torch.bfloat16, size, 4, True, 4.0, images=(1, 1))


# Fewer warps than any of the kernels has; teams of which there is one, or three; chunks that a
# block's rows fill in part; a thread that gathers much, or little.
OTHER_LAYOUTS = (
    Candidate(Layout(1, 9, 1, 64, 6, 32), Layout(3, 3, 1, 64, 4, 16), Layout(2, 4, 2, 64, 4, 16)),
    Candidate(Layout(3, 4, 1, 32, 6, 16), Layout(1, 5, 4, 128, 4, 16), Layout(4, 2, 1, 32, 6, 16)),
    Candidate(Layout(2, 7, 1, 96, 4, 32), Layout(1, 2, 2, 32, 3, 16), Layout(1, 1, 1, 160, 3, 16)),
)


@pytest.mark.parametrize("candidate", OTHER_LAYOUTS)
def test_kernels_of_other_layouts_equal_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, candidate: Candidate
) -> None:
    check_candidate(tmp_path, monkeypatch, candidate)


@pytest.mark.slow
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_kernels_of_layouts_to_be_timed_equal_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, candidate: Candidate
) -> None:
    check_candidate(tmp_path, monkeypatch, candidate)


def check_candidate(folder: Path, monkeypatch: pytest.MonkeyPatch, candidate: Candidate) -> None:
    monkeypatch.setattr(cuda, "shape_of", candidate.shape_of)
    header = folder / "layouts.h"
    header.write_text(candidate.header())
    simulator = compiled_simulator(folder, "-DMEGATRON_NUWA_ONLY_BF16_64", "-include", str(header))
    video, image, clip = Grid(7, 9, 6), Grid(3, 5, 1), Grid(7, 9, 17)
    for masked in (False, True):
        for geometry in (
            Geometry(video, video, Extent(7, 7, 7), True),
            Geometry(video, video, Extent(3, 3, 3), False),
            # So many columns that they go round any ring twice, here or in the mirrored pass.
            Geometry(image, clip, Extent(5, None, None), False),
            Geometry(clip, image, Extent(5, None, None), False),
        ):
            check(simulator, geometry, torch.bfloat16, 64, 5, masked, 4.0, images=(1, 2))


def test_padding_tokens_may_hold_anything(simulator: ctypes.CDLL) -> None:
    """What lies in a masked context token reaches no output, were it NaN."""
    grid = Grid(3, 3, 1)
    geometry = Geometry(grid, grid, Extent(3, 3, 1), False)
    query, key, value, grad = torch.randn(4, 1, 9, 1, 32).bfloat16()
    mask = torch.tensor([[True] * 5 + [False] * 4])
    call = (mask, tables_of(geometry, query), 0.2)
    clean = simulate(simulator, query, key, value, grad, *call)
    key[0, 5:], value[0, 5:] = torch.nan, torch.inf
    for expected, ours in zip(
        clean, simulate(simulator, query, key, value, grad, *call), strict=True
    ):
        assert torch.equal(expected, ours)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [16, 48, 64])
def test_the_backend_pads_head_sizes_and_takes_tensors_that_are_not_contiguous(
    simulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int
) -> None:
    grid = Grid(3, 5, 2)
    operators = SimulatedOperators(simulator)
    operators.geometry = Geometry(grid, grid, Extent(3, 3, 3), True)
    monkeypatch.setattr(cuda, "operators", lambda name: operators)
    monkeypatch.setattr(cuda, "why_not", lambda query: None)
    tensors = [
        torch.randn(2, 2, 30, size).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)
    ]
    grad = torch.randn(2, 30, 2, size).to(dtype)
    results = []
    for backend in ("cuda", "reference"):
        output = nearby_attention(
            *tensors,
            grid=grid,
            extent=(3, 3, 3),
            causal=True,
            backend=backend,  # type: ignore[arg-type]
        )
        results.append((output, *torch.autograd.grad(output, tensors, grad)))
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).norm() <= TOLERANCES[dtype] * expected.norm()


def test_tensors_of_another_grid_never_reach_the_kernels() -> None:
    grid = Grid(3, 5, 2)
    geometry = Geometry(grid, grid, Extent(3, 3, 3), True)
    short, right = torch.zeros(1, 29, 1, 32), torch.zeros(1, 30, 1, 32)
    with pytest.raises(ValueError, match=r"^query "):
        cuda.forward(short, right, right, None, geometry, 1.0)
    with pytest.raises(ValueError, match=r"^key "):
        cuda.forward(right, short, short, None, geometry, 1.0)


class FakeDevice(NamedTuple):
    """What the backend asks a device for."""

    major: int
    minor: int
    shared_memory_per_multiprocessor: int


@pytest.mark.parametrize(
    ("device", "size", "dtype", "reason"),
    [
        (FakeDevice(8, 0, 164 * 1024), 128, torch.bfloat16, None),
        (FakeDevice(9, 0, 228 * 1024), 128, torch.float16, None),
        (FakeDevice(8, 6, 100 * 1024), 64, torch.bfloat16, None),
        (FakeDevice(8, 6, 100 * 1024), 128, torch.float32, None),
        (FakeDevice(8, 6, 100 * 1024), 100, torch.bfloat16, "shared memory"),
        (FakeDevice(7, 5, 64 * 1024), 64, torch.float16, "7.5"),
        (FakeDevice(10, 0, 228 * 1024), 64, torch.float16, "10.0"),
        (FakeDevice(9, 0, 228 * 1024), 129, torch.float16, "head sizes up to 128"),
        (FakeDevice(9, 0, 228 * 1024), 64, torch.float64, "float64"),
    ],
)
def test_the_backend_says_why_it_cannot_take_a_query(
    monkeypatch: pytest.MonkeyPatch,
    device: FakeDevice,
    size: int,
    dtype: torch.dtype,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(cuda, "why_missing", lambda name: None)
    query = MagicMock(device=torch.device("cuda:0"), dtype=dtype, shape=(1, 4, 1, size))
    said = cuda.why_not(query)
    if dtype != torch.float32:
        assert cuda.is_ready(query.device, size) == (said is None or "float64" in said)
    assert said is None if reason is None else reason in (said or "")
    assert "CPU" in (cuda.why_not(torch.zeros(1, 4, 1, 32)) or "").upper()
