"""What the simulated device says of kernels whose threads do not wait for each other as they must.

The real kernels, run with the same check, are in test_cuda_simulated.py.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from simulated_kernels import KERNELS, compiled_simulator, raise_failure, simulate, tables_of

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops.tables import Geometry


def race(one: str, other: str) -> str:
    """What is said of two accesses, in either order."""
    return rf"^race at byte \d+ .*({one}.*{other}|{other}.*{one}).* nothing orders the two"


WRITES, READS, COPIES = (
    rf"{who} \(bodies"
    for who in (r"thread \d+ writes", r"thread \d+ reads", r"a copy by thread \d+ writes")
)
# What is said of each of bodies.cpp; None where all is well.
BODIES = {
    "ring of one slot": race(WRITES, READS),
    "ring of two slots": None,
    "both write": race(WRITES, WRITES),
    "neighbours": None,
    "overlap": "byte 3 of.* thread 0 writes .* thread 32 writes ",
    "warps apart": None,
    "lanes apart": "different instructions: .* at __syncthreads .* at __syncthreads ",
    "some lanes": r"thread \d+ has ended, and thread \d+ waits at __syncthreads \(bodies.cpp:\d+",
    "one warp": r"thread \d+ has ended, and thread \d+ waits at __syncthreads ",
    "one warp waits elsewhere": "nobody can go on: .* at __syncthreads .* at mbarrier wait ",
    "lanes exchange": None,
    "lanes exchange at once": race(WRITES, READS),
    "warps exchange": race(WRITES, READS),
    "shuffle between": race(WRITES, READS),
    "some lanes of a warp": "different instructions: .* at __syncwarp .* at shuffle xor ",
    "a lane leaves": r"thread 5 has ended, and thread \d+ waits at __syncwarp ",
    "matrices": None,
    "matrices at once": race(WRITES, READS),
    "matrices overwritten": race(READS, WRITES),
    "odd row transposed": None,
    "odd row transposed at once": race(WRITES, READS),
    "own copy": None,
    "own copy at once": r"a copy by thread (\d+) writes .* and thread \1 reads ",
    "copies of others": None,
    "copies and the block's barrier": race(COPIES, READS),
    "two copies": None,
    "two copies at once": race(COPIES, COPIES),
    "later copy": race(COPIES, READS),
    "read before a copy": None,
    "copy without a barrier": "a thread ends with copies that no barrier awaits",
    "written beside copies": None,
    "written beside copies that arrive": race(WRITES, READS),
    "passed on": None,
    "first phase": race(WRITES, READS),
    "second phase": None,
    "barrier starts late": race(WRITES, READS),
    "barrier waits for nobody": "nobody can go on: .* at mbarrier wait ",
}


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled_simulator(tmp_path_factory.mktemp("bodies"), source="bodies.cpp")


@pytest.mark.parametrize("name", BODIES)
def test_what_nothing_orders_is_found_and_no_more(bodies: ctypes.CDLL, name: str) -> None:
    said = BODIES[name]
    for pace in range(5):
        if said is None:
            raise_failure(bodies.run_body, name.encode(), pace)
        else:
            with pytest.raises(AssertionError, match=said):
                raise_failure(bodies.run_body, name.encode(), pace)


def test_a_wait_that_is_right_at_some_paces_alone_is_found(bodies: ctypes.CDLL) -> None:
    raise_failure(bodies.run_body, b"mistaken phase", 0)
    with pytest.raises(AssertionError, match=race(WRITES, READS)):
        run_at_many_paces(bodies, b"mistaken phase")


def run_at_many_paces(bodies: ctypes.CDLL, name: bytes) -> None:
    for pace in range(1, 20):
        raise_failure(bodies.run_body, name, pace)


def test_the_simulated_device_rounds_to_fp16_as_pytorch_does(bodies: ctypes.CDLL) -> None:
    numbers = torch.randn(100_000) * 2.0 ** torch.randint(-27, 17, (100_000,))
    bounds = torch.tensor(
        [65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 0.0, torch.inf, torch.nan]
    )
    ours = torch.cat((numbers, bounds, -bounds))
    expected = ours.half().float()
    bodies.to_fp16_and_back(ctypes.c_void_p(ours.data_ptr()), ctypes.c_int64(len(ours)))
    assert torch.equal(ours.nan_to_num(7), expected.nan_to_num(7))


class Mistake(NamedTuple):
    """Another text in one of the kernels' headers, and what is said then."""

    header: str
    right: str
    wrong: str
    said: str
    masked: bool = False


COPY, MATRIX = r"a copy by thread \d+ writes \(ring", r"thread \d+ reads \(tile_walk"
MISTAKES = {
    "a slot is filled while others may read it": Mistake(
        "ring.cuh",
        "wait_for_phase(memory_ + M::done(last.stage), last.phase);",
        "",
        race(COPY, f"(?:{MATRIX}|{COPY})"),
    ),
    "a slot is filled a step too soon": Mistake(
        "ring.cuh", "turn_.before(S::kStages - 1);", "turn_.before(S::kStages);", race(COPY, MATRIX)
    ),
    "a slot is read before its copies have come": Mistake(
        "tile_walk.cuh",
        "ring.wait_for(turn);\n      const uint32_t end",
        "const uint32_t end",
        race(COPY, MATRIX),
    ),
    "tiles are read before their copies have come": Mistake(
        "tile_walk.cuh",
        "ring.wait_for(turn);\n      if (chunk == first",
        "if (chunk == first",
        race(COPY, MATRIX),
    ),
    "groups are looked for where the first item lay": Mistake(
        "tile_walk.cuh",
        "const uint32_t start = turn.stage * M::kStageBytes;",
        "const uint32_t start = 0;",
        race(COPY, MATRIX),
    ),
    "a lane says for its warp that all are done": Mistake(
        "ring.cuh",
        "__syncwarp();\n  if (threadIdx.x % 32 < kArrivals)",
        "if (threadIdx.x % 32 < kArrivals)",
        race(COPY, MATRIX),
    ),
    "a lane says for its warp that all have written": Mistake(
        "ring.cuh",
        "if (is_masked) arrive_for_warp(memory_ + M::full(stage));",
        "if (is_masked && threadIdx.x % 32 == 0) arrive(memory_ + M::full(stage));",
        race(r"thread \d+ writes \(ring", MATRIX),
        masked=True,
    ),
    "barriers are used before they have started": Mistake(
        "tile_walk.cuh",
        "__syncthreads();  // the barriers have started",
        "",
        rf"a barrier is used before it has started|{race('writes .ring', 'reads .ring')}",
    ),
    "half a warp waits for the block": Mistake(
        "tile_walk.cuh",
        "__syncthreads();  // the barriers have started",
        "if (threadIdx.x % 32 < 16) __syncthreads();",
        "lanes of a warp meet at different instructions: .* at __syncthreads ",
    ),
    "halves of a warp wait for the block in different places": Mistake(
        "tile_walk.cuh",
        "__syncthreads();  // the barriers have started",
        "if (threadIdx.x % 32 < 16) __syncthreads();\n else __syncthreads();",
        "lanes of a warp meet at different instructions: .* at __syncthreads .* at __syncthreads ",
    ),
    "a warp leaves while others wait": Mistake(
        "tile_walk.cuh",
        "__syncthreads();  // the barriers have started",
        "if (threadIdx.x / 32 == 1) return;\n__syncthreads();",
        r"thread \d+ has ended, and thread \d+ waits at __syncthreads \(tile_walk.cuh:\d+\)",
    ),
    "a barrier expects more than come": Mistake(
        "ring.cuh",
        "M::done(stage), S::kWarps * kArrivals);",
        "M::done(stage), S::kWarps * kArrivals + 1);",
        r"nobody can go on: thread 0 waits at mbarrier wait \(ring",
    ),
    "a team's last item is never gathered": Mistake(
        "ring.cuh",
        "while (cursor_.is_there()) {",
        "for (int i = 0; i < 9; ++i) {",
        r"nobody can go on: thread 0 waits at mbarrier wait \(ring",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_kernels_is_found(tmp_path: Path, name: str) -> None:
    mistake = MISTAKES[name]
    kernels = shutil.copytree(KERNELS, tmp_path / "kernels")
    header = kernels / mistake.header
    text = header.read_text()
    assert text.count(mistake.right) == 1
    header.write_text(text.replace(mistake.right, mistake.wrong))
    simulator = compiled_simulator(tmp_path, "-DMEGATRON_NUWA_ONLY_BF16_64", kernels=kernels)

    # So many columns that they go round the ring twice, and so many heads that every team has items
    # to spare.
    grid, context, heads = Grid(9, 11, 1), Grid(9, 11, 8), 9
    geometry = Geometry(grid, context, Extent(None, None, None), False)
    query, grad = torch.randn(2, 1, grid.cells, heads, 64).bfloat16()
    key, value = torch.randn(2, 1, context.cells, heads, 64).bfloat16()
    mask = torch.rand(1, context.cells) < 0.5 if mistake.masked else None
    tables = tables_of(geometry, query)
    with pytest.raises(AssertionError, match=mistake.said):
        simulate(simulator, query, key, value, grad, mask, tables, 0.2)
