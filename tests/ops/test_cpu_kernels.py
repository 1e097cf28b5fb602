"""The C++ kernels against the definition in float64, for every instruction set of this machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from geometries import attention, definition, geometries
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import cpu, nearby_attention
from megatron_nuwa.ops.backends import backend_for
from megatron_nuwa.ops.block_tables import BLOCK_ROWS, block_table
from megatron_nuwa.ops.native import why_missing
from megatron_nuwa.ops.tables import Geometry

pytestmark = pytest.mark.skipif(
    why_missing("cpu") is not None, reason=f"no C++ kernels here: {why_missing('cpu')}"
)
VIDEO = Geometry(Grid(21, 21, 10), Grid(21, 21, 10), Extent(3, 3, 3), True)
SMALL = Geometry(Grid(7, 5, 3), Grid(7, 5, 3), Extent(3, 3, 3), True)


@pytest.fixture(params=cpu.available_instruction_sets())
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(cpu.INSTRUCTION_SET_VARIABLE, request.param)
    return str(request.param)


def call(geometry: Geometry, *tensors: Tensor, **arguments: object) -> Tensor:
    return nearby_attention(
        *tensors,
        grid=geometry.grid,
        context_grid=geometry.context_grid,
        extent=geometry.extent,
        causal=geometry.causal,
        **arguments,  # type: ignore[arg-type]
    )


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, mask: Tensor | None, scale: float
) -> Tensor:
    seen = definition(geometry)
    seen = seen if mask is None else seen & mask[:, None, None, :]
    return attention(*(t.transpose(1, 2) for t in (query, key, value)), seen, scale)[0].transpose(
        1, 2
    )


@settings(max_examples=320, deadline=None)
@given(
    geometry=geometries(),
    seed=st.integers(0, 2**31),
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 8, 16, 20, 48, 64, 80])
    ),
    masked=st.booleans(),
    contiguous=st.booleans(),
)
def test_equals_the_definition(
    geometry: Geometry, seed: int, shape: tuple[int, int, int], masked: bool, contiguous: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, size = shape
    queries, keys = geometry.grid.cells, geometry.context_grid.cells
    stored = [
        torch.randn(batch, heads, tokens, size, generator=generator, dtype=torch.float64)
        for tokens in (queries, keys, keys, queries)
    ]
    mask = torch.rand(keys, batch, generator=generator).T < 0.6 if masked else None
    for dtype in cpu.DTYPES:
        # Stored heads-first, and so not contiguous as (batch, tokens, heads, head_dim).
        tensors = [t.to(dtype).transpose(1, 2) for t in stored]
        if contiguous:
            tensors = [t.contiguous() for t in tensors]
        *inputs, grad = (t.detach() for t in tensors)
        wide = [t.double().requires_grad_() for t in inputs]
        expected = by_definition(*wide, geometry, mask, 0.3)
        wanted = (expected, *torch.autograd.grad(expected, wide, grad.double()))
        for instructions in cpu.available_instruction_sets():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(cpu.INSTRUCTION_SET_VARIABLE, instructions)
                ours = [
                    t.clone().requires_grad_() if contiguous else t.requires_grad_() for t in inputs
                ]
                output = call(geometry, *ours, context_mask=mask, scale=0.3, backend="cpu")
                got = (output, *torch.autograd.grad(output, ours, grad))
            for name, result, right in zip(
                ("output", "query", "key", "value"), got, wanted, strict=True
            ):
                assert result.dtype == dtype
                difference = (result.detach().double() - right.detach()).abs()
                if dtype == torch.float32:
                    assert difference.max() <= 1e-5 * max(1, right.abs().max()), (
                        name,
                        instructions,
                    )
                else:
                    # Relative to a gradient of typical size: a query of one key has none at all.
                    typical = max(float(right.detach().norm()), 0.1 * math.sqrt(right.numel()))
                    assert difference.norm() <= 1e-2 * typical, (name, instructions)


@settings(max_examples=60, deadline=None)
@given(geometry=geometries(), mirrored=st.booleans())
def test_block_tables_equal_the_definition(geometry: Geometry, mirrored: bool) -> None:
    table = block_table(geometry, mirrored).tolist()
    blocks = table[0]
    rows = table[1 : 1 + 4 * blocks]
    starts = table[1 + 4 * blocks : 2 + 5 * blocks]
    counts = table[2 + 5 * blocks : 2 + 6 * blocks]
    entries = table[2 + 6 * blocks :]
    seen = definition(geometry)
    seen = seen.T if mirrored else seen
    assert sorted(row for row in rows if row >= 0) == list(range(seen.shape[0]))
    rebuilt = torch.zeros_like(seen)
    for block in range(blocks):
        start, stop = starts[block], starts[block + 1]
        assert start % 16 == stop % 16 == 0
        assert all(entry & 15 == 0 for entry in entries[start + counts[block] : stop])
        for entry in entries[start : start + counts[block]]:
            for bit in range(BLOCK_ROWS):
                if entry & 1 << bit:
                    rebuilt[rows[BLOCK_ROWS * block + bit], entry >> 4] = True
    assert torch.equal(rebuilt, seen)


def random_inputs(geometry: Geometry, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    cells = (geometry.grid.cells, geometry.context_grid.cells, geometry.context_grid.cells)
    return [torch.randn(2, n, 2, 32, generator=generator).to(dtype).requires_grad_() for n in cells]


def test_is_the_default_on_cpus() -> None:
    for dtype in cpu.DTYPES:
        assert backend_for(torch.empty(1, 1, 1, 7, dtype=dtype), "auto") is cpu
    assert backend_for(torch.empty(1, 1, 1, 7, dtype=torch.float64), "auto") is not cpu


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_same_bits_on_every_run_and_number_of_threads(
    dtype: torch.dtype, instructions: str
) -> None:
    inputs = random_inputs(VIDEO, dtype)
    mask = torch.rand(2, VIDEO.grid.cells, generator=torch.Generator().manual_seed(1)) < 0.8
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            output = call(VIDEO, *inputs, context_mask=mask, backend="cpu")
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_seen_has_no_influence_even_as_nan(instructions: str) -> None:
    inputs = random_inputs(SMALL)
    mask = torch.ones(2, SMALL.grid.cells, dtype=torch.bool)
    mask[:, 40] = False
    poisoned = [t.detach().clone() for t in inputs]
    for tensor in poisoned[1:]:
        tensor[:, 40] = torch.nan
        tensor[:, 60:] = torch.nan
    clean = call(SMALL, *inputs, context_mask=mask, backend="cpu")
    output = call(SMALL, *poisoned, context_mask=mask, backend="cpu")
    assert torch.equal(output[:, :60], clean[:, :60])
    assert output[:, 60:].isnan().any(-1).all()

    grad = torch.zeros_like(clean)
    grad[:, 60:] = torch.nan
    keys_before = torch.autograd.grad(clean, inputs[1], grad)[0]
    first_touched = min(int(i) for i in definition(SMALL)[60:].any(0).nonzero())
    assert torch.equal(
        keys_before[:, :first_touched], torch.zeros_like(keys_before[:, :first_touched])
    )
    assert torch.equal(keys_before[:, 40], torch.zeros_like(keys_before[:, 40]))


def test_infinite_and_huge_scores(instructions: str) -> None:
    query, key, value = (t.detach() for t in random_inputs(SMALL))
    expected = by_definition(*((t.double()) for t in (query * 1e4, key, value)), SMALL, None, 1.0)
    output = call(SMALL, query * 1e4, key, value, scale=1.0, backend="cpu")
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)


def test_opcheck(instructions: str) -> None:
    geometry = Geometry(Grid(4, 4, 2), Grid(2, 3, 1), Extent(3, 1, 3), False)
    mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    torch.library.opcheck(
        torch.ops.megatron_nuwa.nearby_attention.default,
        (*random_inputs(geometry), mask, [4, 4, 2], [2, 3, 1], [3, 1, 3], False, 0.5, "cpu"),
    )


def test_compiles_without_graph_breaks() -> None:
    inputs = random_inputs(SMALL)

    def loss(*tensors: Tensor) -> Tensor:
        return call(SMALL, *tensors, backend="cpu").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)
    )


def test_errors_say_why_a_backend_cannot_run() -> None:
    wide = [t.detach().double() for t in random_inputs(SMALL)]
    with pytest.raises(ValueError, match=r"backend 'cpu' .* takes float32 and bfloat16.*float64"):
        call(SMALL, *wide, backend="cpu")
    with pytest.raises(ValueError, match=r"backend 'cuda' .* CUDA device, and query is on cpu"):
        call(SMALL, *(t.detach() for t in random_inputs(SMALL)), backend="cuda")


def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.INSTRUCTION_SET_VARIABLE, "avx9000")
    with pytest.raises(ValueError, match="MEGATRON_NUWA_CPU_INSTRUCTIONS must be one of generic"):
        call(SMALL, *(t.detach() for t in random_inputs(SMALL)), backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": 2}, "a table entry is out of bounds"),
        ({"table": 1}, "a table row is out of bounds"),
        ({"table": 0}, "a table is too short"),
        ({"query": torch.zeros(1, 4, 1, 16, dtype=torch.float64)}, "dtype"),
        ({"query": torch.zeros(1, 4, 1, 20)}, "multiple of 16"),
        ({"key": torch.zeros(1, 3, 1, 16)}, "shape"),
        ({"key": torch.zeros(1, 16, 1, 4).transpose(1, 3)}, "contiguous"),
        ({"mask": torch.zeros(1, 5, dtype=torch.bool)}, "shape"),
        ({"instructions": 3}, "instruction set"),
    ],
)
def test_the_raw_operator_never_leaves_its_tensors(change: dict, message: str) -> None:  # type: ignore[type-arg]
    geometry = Geometry(Grid(2, 2, 1), Grid(2, 2, 1), Extent(3, 3, 1), False)
    table = block_table(geometry, False).clone()
    places = {0: (0, 1000), 1: (1, 99), 2: (-1, 4 << 4)}
    if "table" in change:
        place, content = places[change["table"]]
        table[place] = content
    tensor = torch.zeros(1, 4, 1, 16)
    query, key = change.get("query", tensor), change.get("key", tensor)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.megatron_nuwa_native.cpu_forward(
            query,
            key,
            tensor,
            change.get("mask"),
            torch.empty_like(query),
            torch.empty(1, 1, 4),
            table,
            1.0,
            change.get("instructions", 0),
        )


_PEAK = """
import torch
from pathlib import Path
from megatron_nuwa.ops import nearby_attention

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

def run(inputs, grad):
    video = {"grid": (21, 21, 10), "extent": (7, 7, 7), "causal": True}
    output = nearby_attention(*inputs, **video, backend="cpu")
    return output, torch.autograd.grad(output, inputs, grad)

def tensors(batch):
    inputs = [torch.randn(batch, 4410, 4, 64, dtype=torch.DTYPE).requires_grad_() for _ in range(3)]
    return inputs, torch.randn(batch, 4410, 4, 64, dtype=torch.DTYPE)

run(*tensors(1))  # builds the tables
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
inputs, grad = tensors(8)
kept = run(inputs, grad)
bytes_of_tensors = 8 * grad.numel() * grad.element_size()
print((status("VmHWM") - before) / bytes_of_tensors)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_that_of_inputs_outputs_and_gradients(dtype: str) -> None:
    # What the first call frees goes back to the system at once, and is not used again unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK.replace("DTYPE", dtype)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert 0.8 < float(done.stdout) <= 1.2
