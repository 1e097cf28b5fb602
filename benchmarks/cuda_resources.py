"""Registers, shared memory, occupancy and tables of the CUDA kernels, without a GPU. Example:

python -m benchmarks.cuda_resources            # needs nvcc
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.cases import Case, cases
from benchmarks.harness.options import benchmark_parser
from benchmarks.harness.report import write_json
from megatron_nuwa.command_line import output_file
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.ops import build, warp_tables
from megatron_nuwa.ops.tilings import GROUP, TILE_ROWS

OUTPUT = Path(__file__).parent / "results" / "cuda_resources.json"
HEAD_SIZES = (32, 64, 128)
# Shared memory of a multiprocessor in KiB; both have 65,536 registers, 64 warps and 32 blocks.
_PROCESSORS = {"sm_80": 164, "sm_90a": 228}
_REGISTERS, _WARPS, _BLOCKS = 65_536, 64, 32
_DIRECT_WARPS = 8
# The driver keeps a KiB of every block's shared memory.
_RESERVED_BYTES = 1024

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTER_COUNT = re.compile(r"Used (\d+) registers")
_SHARED_PROGRAM = """
#include <cstdio>
#include "backward.cuh"
#include "forward.cuh"
using namespace megatron_nuwa;
template <int size, bool is_large> void print() {
  const auto print_pass = [](const char* name, int threads, int bytes) {
    std::printf("%s,%s %d,%d,%d\\n", is_large ? "sm_90a" : "sm_80", name, size, threads, bytes);
  };
  using A = Forward<bf16, size>;
  using B = Backward<bf16, size, false>;
  using C = Backward<bf16, size, true>;
  print_pass("forward", Shape<A, is_large>::kThreads, Memory<A, is_large>::kBytes);
  print_pass("backward dQ", Shape<B, is_large>::kThreads, Memory<B, is_large>::kBytes);
  print_pass("backward dK dV", Shape<C, is_large>::kThreads, Memory<C, is_large>::kBytes);
}
template <bool is_large> void print_all() {
  print<32, is_large>();
  print<64, is_large>();
  print<128, is_large>();
}
int main() {
  print_all<false>();
  print_all<true>();
}
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture, as the assembler reports it."""

    symbol: str
    architecture: str
    registers: int
    stack_bytes: int
    spilled_bytes: int

    @property
    def title(self) -> str:
        """Pass, type and head size."""
        name = re.search(r"Forward|Backward|direct_\w+?(?=I)|query_statistics", self.symbol)
        kind = "" if name is None else name[0].lower()
        dtype = "bf16" if "bfloat16" in self.symbol else "fp16" if "half" in self.symbol else "fp32"
        size = re.search(r"Li(\d+)E", self.symbol)
        if "backward" in kind:
            kind += " dK dV" if "Lb1E" in self.symbol else " dQ"
        return f"{kind} {dtype} {size[1] if size else ''}".strip()

    @property
    def is_tensor_core(self) -> bool:
        """Whether it is one of the kernels that walk warp tables."""
        return "4walkI" in self.symbol


def kernels_of(report: str) -> Iterator[Kernel]:
    """Every kernel in what `nvcc -Xptxas -v` printed."""
    for entry in re.split(r"(?=Compiling entry function)", report)[1:]:
        name, spills, registers = (p.search(entry) for p in (_ENTRY, _SPILLS, _REGISTER_COUNT))
        if name is None or spills is None or registers is None:
            raise ValueError(f"unknown form of assembler report: {entry[:200]!r}")
        stack, stored, loaded = map(int, spills.groups())
        yield Kernel(name[1], name[2], int(registers[1]), stack, stored + loaded)


def compiled_kernels(folder: Path) -> list[Kernel]:
    """Compile every source for every architecture; object files go to `folder`."""

    def compile_one(command: Sequence[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stdout + done.stderr

    commands = build.cuda_compile_commands(folder)
    with ThreadPoolExecutor(2) as pool:
        return [k for report in pool.map(compile_one, commands) for k in kernels_of(report)]


@dataclass(frozen=True)
class Block:
    """Warps of a block of threads, and bytes of its dynamic shared memory."""

    warps: int = _DIRECT_WARPS
    shared_bytes: int = 0


def walking_blocks(folder: Path) -> dict[tuple[str, str], Block]:
    """The block of every tensor-core kernel by architecture and title."""
    source, program = folder / "shared.cu", folder / "shared"
    source.write_text(_SHARED_PROGRAM)
    nvcc = build.cuda_compile_commands(folder)[0][0]
    include = f"-I{build.SOURCES / 'cuda'}"
    subprocess.run(
        [nvcc, "-std=c++20", include, "-arch=sm_80", str(source), "-o", str(program)], check=True
    )
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in printed.splitlines():
        architecture, name, threads, shared = line.split(",")
        kind, size = name.rsplit(" ", 1)
        for dtype in ("bf16", "fp16"):
            block = Block(int(threads) // 32, int(shared))
            found[architecture, f"{kind} {dtype} {size}"] = block
    return found


def blocks_a_processor(kernel: Kernel, block: Block) -> tuple[int, str]:
    """Blocks that fit one multiprocessor, and what runs out first."""
    # Registers are given out 256 at a time to a warp, and a quarter of the warps share a quarter.
    registers_a_warp = -(-kernel.registers * 32 // 256) * 256
    warps_a_part = _REGISTERS // 4 // registers_a_warp
    limits = {
        "registers": warps_a_part * 4 // block.warps,
        "shared memory": _PROCESSORS[kernel.architecture]
        * 1024
        // (block.shared_bytes + _RESERVED_BYTES),
        "warps": min(_WARPS // block.warps, _BLOCKS),
    }
    scarce = min(limits, key=lambda name: limits[name])
    return limits[scarce], scarce


def table_figures(case: Case, mirrored: bool) -> dict[str, float]:
    """How well the tables of one case fill the matrix instructions, and what they re-read."""
    device, grids = torch.device("cpu"), (case.geometry.grid, case.geometry.context_grid)
    warp_tables.warp_tables.cache_clear()
    start = time.perf_counter()
    shape = warp_tables.shape_of(64, "context gradients" if mirrored else "outputs", True)
    tables = warp_tables.warp_tables(case.geometry, mirrored, shape, device)
    seconds = time.perf_counter() - start
    block_chunks, places, rows, starts, _, entries = (t.numpy() for t in tables)
    # All blocks' rows are among the places, as often as the kernel reads them.
    gathered = int((places >= 0).sum()) - shape.row_rounds * grids[mirrored].cells
    groups = len(entries) - 1
    # A block ends with its slowest warp.
    of_tile = np.diff([*starts, groups]).reshape(-1, shape.warps)
    # Rows that `ldmatrix` fetches at once from one group of banks wait for one another.
    octets = (entries[:-1] & 0xFFFF).reshape(-1, 8) // shape.row_bytes
    waits = sum(max(len({*o[o % 8 == bank]}) for bank in range(8)) for o in octets)
    return {
        "blocks": len(block_chunks) - 1,
        "groups": groups,
        "efficiency": case.pairs / (groups * TILE_ROWS * GROUP),
        "filled_rows": float((rows >= 0).sum() / ((rows.reshape(-1, 16) >= 0).any(1).sum() * 16)),
        "rereads": gathered / grids[not mirrored].cells,
        "balance": groups / int(of_tile.max(1).sum() * shape.warps),
        "bank_conflicts": waits / len(octets),
        "table_bytes": sum(t.numel() * t.element_size() for t in tables),
        "build_seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = benchmark_parser("cuda_resources", __doc__)
    parser.add_argument("--output", type=output_file, default=OUTPUT, help="JSON file to write")
    options = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    with TemporaryDirectory() as folder:
        try:
            kernels = compiled_kernels(Path(folder))
        except build.CannotBuildError as error:
            raise UserError(f"the CUDA kernels cannot be compiled here: {error}") from error
        blocks_of = walking_blocks(Path(folder))
    resources = []
    for kernel in sorted(kernels, key=lambda k: (k.architecture, k.title)):
        block = blocks_of.get((kernel.architecture, kernel.title), Block())
        blocks, scarce = blocks_a_processor(kernel, block)
        resources.append(
            asdict(kernel)
            | {"title": kernel.title}
            | asdict(block)
            | {"blocks_a_processor": blocks, "limited_by": scarce}
        )
    figures = {
        f"{case.name}{' mirrored' if mirrored else ''}": table_figures(case, mirrored)
        for case in cases(False)
        for mirrored in (False, True)
    }
    _show(console, resources, figures)
    report = {"kernels": resources, "tables_of_head_size_64": figures}
    write_json(options.output, report)
    return 0


def _show(
    console: Console,
    resources: Sequence[dict[str, object]],
    figures: dict[str, dict[str, float]],
) -> None:
    headings = ("registers", "spilled_bytes", "shared_bytes", "blocks_a_processor", "limited_by")
    table = Table("kernel", "architecture", *(h.replace("_", " ") for h in headings))
    for row in resources:
        table.add_row(*(str(row[h]) for h in ("title", "architecture", *headings)))
    console.print(table)
    table = Table("tables", *next(iter(figures.values())))
    for name, row in figures.items():
        table.add_row(name, *(f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for v in row.values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(run_command(main))
