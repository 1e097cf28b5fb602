"""The CUDA kernels' tables and the walk over them, on any machine, against the definition."""

from __future__ import annotations

import time
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import warp_emulator
from geometries import attention, definition, geometries
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nuwa.grid import Extent, Grid, nearby_indices
from megatron_nuwa.ops import warp_tables
from megatron_nuwa.ops.schedule import Sharing, block_costs, schedule, shared_out
from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.ops.tilings import GROUP, TILE_ROWS
from megatron_nuwa.ops.warp_tables import Shape

CPU = torch.device("cpu")
VIDEO = Grid(21, 21, 10)
# Those of the kernels, and one that none of them has.
SHAPES = sorted(
    {
        warp_tables.shape_of(size, sums, is_large)
        for size in (32, 64, 128)
        for sums in get_args(warp_tables.Sums)
        for is_large in (False, True)
    }
    | {Shape(3, 24, 5, 128), Shape(5, 32, 4, 128, 2)}
)


@settings(max_examples=25, deadline=None)
@given(geometry=geometries())
def test_the_mask_of_these_tests_equals_the_definition(geometry: Geometry) -> None:
    if geometry.grid.cells * geometry.context_grid.cells > 10_000:
        geometry = geometry._replace(grid=Grid(3, 2, 2), context_grid=Grid(3, 2, 2))
    seen = definition(geometry)
    for n in range(geometry.grid.cells):
        assert seen[n].nonzero().flatten().tolist() == nearby_indices(n, *geometry)


@settings(max_examples=300, deadline=None)
@given(geometry=geometries(), mirrored=st.booleans(), shape=st.sampled_from(SHAPES))
def test_tables_hold_every_visible_pair_once_and_read_only_what_is_there(
    geometry: Geometry, mirrored: bool, shape: Shape
) -> None:
    tables = warp_tables.warp_tables(geometry, mirrored, shape, CPU)
    warps, chunk, stages = shape.warps, shape.chunk, shape.stages
    assert all(table.is_contiguous() for table in tables)
    seen = definition(geometry)
    seen = seen.T if mirrored else seen
    counted = torch.zeros(seen.shape, dtype=torch.int64)
    block_chunks, columns, rows, starts, ends, entries = (t.numpy() for t in tables)
    assert np.array_equal(np.sort(rows[rows >= 0]), np.arange(seen.shape[0]))
    # Those of a block that see much come before those that see little.
    sees = (F.pad(seen, (0, 0, 0, 1))[rows].view(-1, TILE_ROWS, seen.shape[1])).any(1).sum(1)
    assert (sees.view(-1, warps).diff(dim=1) <= 0).all()
    assert columns.shape == (block_chunks[-1] * chunk,)
    assert ends.shape == (block_chunks[-1] * warps,)
    # Groups of a tile follow one another, tile by tile, and each belongs to exactly one step.
    assert starts[0] == 0
    assert entries.shape == (ends.max() + 1, 32)
    following = np.append(starts[1:], len(entries) - 1).reshape(-1, warps)
    for block in range(len(block_chunks) - 1):
        first, last = block_chunks[block], block_chunks[block + 1]
        assert last > first
        of_block = columns[first * chunk : last * chunk]
        own_rows = rows.reshape(-1, warps * TILE_ROWS)[block]
        for of_round in np.split(of_block[: shape.row_chunks * chunk], shape.row_rounds):
            assert np.array_equal(of_round[: len(own_rows)], own_rows)
            assert (of_round[len(own_rows) :] == -1).all()
        assert of_block[shape.row_chunks * chunk :].max() < seen.shape[1]
        steps = np.vstack([starts.reshape(-1, warps)[block], ends.reshape(-1, warps)[first:last]])
        assert (np.diff(steps, axis=0) >= 0).all()
        assert np.array_equal(steps[-1], following[block])
        for warp in range(warps):
            tile = rows.reshape(-1, warps, TILE_ROWS)[block, warp]
            for step in range(last - first):
                for entry in entries[steps[step, warp] : steps[step + 1, warp]]:
                    slots, visible = warp_emulator.decode(shape, entry)
                    # The newest chunk that has passed through the slot by this step.
                    newest = step - (step - slots // chunk) % stages
                    assert (newest >= max(step - 1, shape.row_chunks)).all()
                    place = newest * chunk + slots % chunk
                    there = of_block[place]
                    assert (there >= 0).all()
                    row, column = np.nonzero(visible)
                    assert (tile[row] >= 0).all()
                    np.add.at(counted.numpy(), (tile[row], there[column]), 1)
    assert torch.equal(counted, seen.long())


@settings(max_examples=300, deadline=None)
@given(
    geometry=geometries(),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
    shape=st.sampled_from(SHAPES),
    strength=st.sampled_from([0.3, 30.0]),
)
def test_the_walk_equals_the_definition(
    geometry: Geometry, seed: int, masked: bool, shape: Shape, strength: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, size, scale = 2, 4, strength

    def random(cells: int) -> torch.Tensor:
        return torch.randn(images, cells, size, generator=generator, dtype=torch.float64)

    queries, keys = geometry.grid.cells, geometry.context_grid.cells
    query, key, value = (random(n).requires_grad_() for n in (queries, keys, keys))
    shown = torch.rand(images, keys, generator=generator) < 0.5
    shown = shown if masked else torch.ones_like(shown)
    seen = definition(geometry) & shown.unsqueeze(1)
    expected, expected_log_sum = attention(query, key, value, seen, scale)
    grad = random(queries)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), grad)

    with torch.no_grad():
        tables = warp_tables.warp_tables(geometry, False, shape, CPU)
        mirrored = warp_tables.warp_tables(geometry, True, shape, CPU)
        output, log_sum = warp_emulator.forward(
            query, key, value, shown.double(), tables, shape, scale
        )
        torch.testing.assert_close(output, expected.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(log_sum, expected_log_sum.detach(), rtol=1e-9, atol=1e-9)
        statistics = (log_sum, (grad * output).sum(-1))
        of_query, of_key = (query, grad), (key, value)
        arguments = (statistics, shown.double())
        grad_query, _ = warp_emulator.backward(
            of_query, of_key, *arguments, tables, shape, scale, mirrored=False
        )
        grad_key, grad_value = warp_emulator.backward(
            of_key, of_query, *arguments, mirrored, shape, scale, mirrored=True
        )
    torch.testing.assert_close(
        (grad_query, grad_key, grad_value), expected_gradients, rtol=1e-8, atol=1e-8
    )


@settings(max_examples=50, deadline=None)
@given(geometry=geometries(), mirrored=st.booleans())
def test_row_tables_equal_the_definition(geometry: Geometry, mirrored: bool) -> None:
    tables = warp_tables.row_tables(geometry, mirrored, CPU)
    seen = definition(geometry)
    seen = seen.T if mirrored else seen
    assert tables.starts.tolist() == [0, *seen.sum(1).cumsum(0).tolist()]
    assert torch.equal(tables.columns.long(), seen.nonzero()[:, 1])


@pytest.mark.parametrize(
    ("sums", "width", "efficiency", "rereads"),
    [
        ("outputs", 7, 0.42, 5.4),
        ("outputs", 3, 0.14, 2.2),
        ("context gradients", 7, 0.42, 5.8),
        ("context gradients", 3, 0.14, 2.2),
    ],
)
def test_tables_of_a_video_are_made_fast_and_waste_little(
    sums: warp_tables.Sums, width: int, efficiency: float, rereads: float
) -> None:
    geometry = Geometry(VIDEO, VIDEO, Extent(width, width, width), True)
    mirrored = sums == "context gradients"
    shape = warp_tables.shape_of(64, sums, True)
    warp_tables.warp_tables.cache_clear()
    start = time.process_time()
    tables = warp_tables.warp_tables(geometry, mirrored, shape, CPU)
    seconds = time.process_time() - start
    pairs = len(warp_tables.row_tables(geometry, mirrored, CPU).columns)
    groups = len(tables.entries) - 1
    assert pairs / (groups * TILE_ROWS * GROUP) > efficiency
    assert int((tables.columns >= 0).sum()) / VIDEO.cells - shape.row_rounds < rereads
    assert row_waits(tables, shape) < 1.15
    assert seconds < 1
    assert warp_tables.warp_tables(geometry, mirrored, shape, CPU) is tables


# What an H100 and an A100 have, and other numbers of heads and batch items.
@pytest.mark.parametrize(
    ("processors", "heads", "batch", "most"),
    [(132, 20, 8, 1.02), (108, 20, 8, 1.02), (132, 16, 4, 1.06), (132, 20, 1, 1.15)],
)
@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize("sums", get_args(warp_tables.Sums))
def test_teams_get_like_shares(
    sums: warp_tables.Sums, width: int, processors: int, heads: int, batch: int, most: float
) -> None:
    geometry = Geometry(VIDEO, VIDEO, Extent(width, width, width), True)
    mirrored, shape = sums == "context gradients", warp_tables.shape_of(64, sums, True)
    sharing = Sharing(batch, heads, shape.teams * processors)
    handed_out = schedule(geometry, mirrored, shape, sharing, CPU)
    assert handed_out is schedule(geometry, mirrored, shape, sharing, CPU)
    items, first = handed_out[handed_out >= 0], handed_out[0]
    assert torch.equal(items.sort().values, torch.arange(len(items), dtype=torch.int32))
    assert (handed_out[-2:] == -1).all()
    if batch > 1:
        # The mirrored pass begins where the one before it has ended.
        assert (first > len(items) / 2 if mirrored else first < len(items) / 2).all()
    costs = block_costs(warp_tables.warp_tables(geometry, mirrored, shape, CPU), shape)
    of_items = sharing.items(costs)
    of_teams = np.append(of_items, 0)[handed_out.numpy()].sum(0)
    assert of_teams.max() < most * of_teams.mean()
    # No worse than if teams took every so many items.
    dealt = np.pad(of_items, (0, -len(of_items) % sharing.teams)).reshape(-1, sharing.teams).sum(0)
    assert of_teams.max() <= dealt.max()


@given(costs=st.lists(st.floats(0.5, 100), max_size=80), teams=st.integers(1, 9))
def test_every_item_is_handed_out_once(costs: list[float], teams: int) -> None:
    rounds = shared_out(np.array(costs), teams)
    assert rounds.shape[1] == teams
    assert np.array_equal(np.sort(rounds[rounds >= 0]), np.arange(len(costs)))
    # A team that has none in a round has none later.
    assert (np.diff((rounds >= 0).astype(int), axis=0) <= 0).all()
    # Whoever is free first gets the next one: nobody works longer than that allows.
    of_teams = np.append(costs, 0)[rounds].sum(0)
    assert of_teams.max() <= of_teams.mean() + max(costs, default=0) + 1e-9


def test_the_last_rounds_hand_out_the_dearest_first() -> None:
    costs = np.array([1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 7.0])
    rounds = shared_out(costs, teams=2)
    # The first two in order; of the last eight those that cost 7, 5 and 2, and then the others.
    assert rounds.T.tolist() == [[0, 9, 3, 5, 7], [1, 2, 8, 4, 6]]


def row_waits(tables: warp_tables.WarpTables, shape: Shape) -> float:
    """Reads that `ldmatrix` needs for eight rows of a group, on average: rows of one bank wait."""
    slots = (tables.entries[:-1].numpy() & 0xFFFF) // shape.row_bytes
    octets = [np.unique(octet) for octet in slots.reshape(-1, 8)]
    return float(np.mean([np.bincount(octet % 8).max() for octet in octets]))
