"""Other layouts of the CUDA kernels (tiles.cuh's `Layout`) for head size 64: which is the fastest?

Every row of candidates is compiled into a library of its own, whose registers are told, checked
against the reference, and timed: outputs, gradients of queries, gradients of keys and values, each
with its own layout. The first row is what the package ships. It needs nvcc, and a GPU of compute
capability 9.0 unless --build-only is given. Example:

python -m benchmarks.kernel_layouts --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cuda_resources import kernels_of
from benchmarks.harness.cases import Case, Load, cases
from benchmarks.harness.options import add_output, benchmark_parser, positive
from benchmarks.harness.report import device_name, write_json
from benchmarks.nearby_kernels import kernel_times
from megatron_nuwa.command_line import whole_number
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops import build, cuda, native, nearby_attention, warp_tables
from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.ops.warp_tables import Shape, Sums

HEAD_SIZE = 64
ARCHITECTURE = "90a"
# What bf16 may differ by, relative to the reference in fp32.
_TOLERANCE = 1e-2
_CASES = ("video-3-causal", "video-7-causal")
_TIMED: dict[Sums, str] = {
    "outputs": "forward",
    "query gradients": "backward dQ",
    "context gradients": "backward dK dV",
}


class Layout(NamedTuple):
    """`Layout` of tiles.cuh."""

    teams: int
    warps: int
    gatherers: int
    chunk: int
    stages: int
    at_once: int

    def __str__(self) -> str:
        return ", ".join(map(str, self))

    def shape(self, sums: Sums) -> Shape:
        """What tables must know of it."""
        rounds = warp_tables.ROW_ROUNDS[sums]
        return Shape(self.warps, self.chunk, self.stages, 2 * HEAD_SIZE, rounds, self.teams)


class Candidate(NamedTuple):
    """One library: a layout for each of `Sums`, in their order."""

    outputs: Layout
    query_gradients: Layout
    context_gradients: Layout

    def header(self) -> str:
        """What the sources are compiled with."""
        names = (name.upper() for name in self._fields)
        return "".join(
            f"#define MEGATRON_NUWA_{n} {layout}\n" for n, layout in zip(names, self, strict=True)
        )

    def shape_of(self, head_dim: int, sums: Sums, is_large: bool) -> Shape:
        """`warp_tables.shape_of` with these layouts."""
        if head_dim == HEAD_SIZE and is_large:
            return dict(zip(get_args(Sums), self, strict=True))[sums].shape(sums)
        return warp_tables.shape_of(head_dim, sums, is_large)


# More warps hide more latency, and take registers from one another: of sixteen that compute each
# has 112 where four gather beside them, and 128 where two do; of twelve each has 160. The larger a
# team, the fewer columns are gathered again by its neighbours.
CANDIDATES = (
    Candidate(Layout(2, 8, 2, 64, 7, 32), Layout(2, 8, 2, 64, 7, 16), Layout(2, 6, 2, 64, 6, 16)),
    Candidate(Layout(2, 8, 4, 64, 6, 16), Layout(2, 8, 2, 64, 6, 16), Layout(2, 6, 2, 96, 4, 16)),
    Candidate(
        Layout(1, 16, 4, 64, 8, 32), Layout(1, 16, 4, 64, 8, 16), Layout(1, 12, 4, 64, 8, 16)
    ),
    Candidate(Layout(2, 8, 2, 128, 3, 32), Layout(1, 12, 4, 64, 8, 16), Layout(1, 8, 4, 64, 8, 16)),
    Candidate(Layout(2, 7, 1, 64, 6, 32), Layout(2, 7, 1, 64, 6, 16), Layout(1, 10, 2, 64, 8, 16)),
)


@dataclass(frozen=True)
class Built:
    """What the assembler says of one pass of a candidate."""

    layout: str
    registers: int
    spilled_bytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_args(arguments)
    if options.candidate is not None:
        print(json.dumps(_measured(options.candidate, options.library, options.repeats)))
        return 0
    if not options.build_only:
        _check_device()
    with TemporaryDirectory() as folder:
        try:
            with ThreadPoolExecutor(2) as pool:
                numbers = range(len(CANDIDATES))
                built = list(pool.map(partial(_build, Path(folder)), numbers))
        except build.CannotBuildError as error:
            raise UserError(f"the CUDA kernels cannot be compiled here: {error}") from error
        reports = [{sums: asdict(of) for sums, of in passes.items()} for _, passes in built]
        if not options.build_only:
            for number, ((library, _), report) in enumerate(zip(built, reports, strict=True)):
                for sums, found in _in_own_process(number, library, options.repeats).items():
                    report[sums] |= found
    _show(reports)
    device = None if options.build_only else device_name(torch.device("cuda"))
    write_json(options.output, {"device": device, "candidates": reports})
    return 0


def _check_device() -> None:
    if not torch.cuda.is_available():
        raise UserError(
            "benchmarks.kernel_layouts needs a GPU, and torch sees none; --build-only does without"
        )
    if torch.cuda.get_device_capability() != (9, 0):
        raise UserError("the layouts are for compute capability 9.0, and this GPU has another")


def _build(folder: Path, number: int) -> tuple[Path, dict[Sums, Built]]:
    """The library of a candidate, and what its kernels take."""
    here = folder / str(number)
    here.mkdir()
    header, library = here / "layouts.h", here / build.library_name("cuda")
    header.write_text(CANDIDATES[number].header())
    commands = partial(
        build.cuda_compile_commands,
        architectures=(ARCHITECTURE,),
        more_flags=("-include", str(header)),
    )
    said = build.build("cuda", library, commands)
    titles = {f"{kernel} bf16 {HEAD_SIZE}": sums for sums, kernel in _TIMED.items()}
    found = {titles[kernel.title]: kernel for kernel in kernels_of(said) if kernel.title in titles}
    return library, {
        sums: Built(str(layout), found[sums].registers, found[sums].spilled_bytes)
        for sums, layout in zip(get_args(Sums), CANDIDATES[number], strict=True)
    }


def _in_own_process(number: int, library: Path, repeats: int) -> dict[Sums, dict[str, object]]:
    """What `_measured` finds; one process can load only one library of these operators."""
    command = [sys.executable, "-m", "benchmarks.kernel_layouts", "--candidate", str(number)]
    command += ["--library", str(library), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        return {sums: {"failure": reason} for sums in _TIMED}
    found: dict[Sums, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(number: int, library: Path, repeats: int) -> dict[Sums, dict[str, object]]:
    """Relative errors and microseconds of each pass of a candidate, by this process."""
    _use(CANDIDATES[number], library)
    load = Load.of(torch.device("cuda"), quick=False)
    errors = _errors(load)
    found: dict[Sums, dict[str, object]] = {
        sums: {"error": errors[sums], "microseconds": {}} for sums in _TIMED
    }
    if max(errors.values()) > _TOLERANCE:
        return found
    for case in cases(False):
        if case.name in _CASES:
            times = kernel_times(case, load, repeats)
            for sums, kernel in _TIMED.items():
                found[sums]["microseconds"] |= {case.name: times[kernel]}  # type: ignore[operator]
    return found


def _use(candidate: Candidate, library: Path) -> None:
    """Let the operator run on this library."""
    cuda.shape_of = candidate.shape_of
    native.library_path = lambda name: library
    native.why_missing.cache_clear()


def _errors(load: Load) -> dict[Sums, float]:
    """The largest relative error of each pass over a few geometries, masked and not."""
    worst: dict[Sums, float] = dict.fromkeys(_TIMED, 0.0)
    video, image = Grid(13, 11, 6), Grid(13, 11, 1)
    for geometry in (
        Geometry(video, video, Extent(7, 7, 7), True),
        Geometry(video, video, Extent(3, 3, 3), False),
        Geometry(video, image, Extent(7, 7, 7), False),
    ):
        case = Case("check", "check", geometry)
        small = Load(2, 3, HEAD_SIZE, load.dtype, load.device)
        for masked in (False, True):
            for sums, error in _errors_of(case, small, masked).items():
                worst[sums] = max(worst[sums], error)
    return worst


def _errors_of(case: Case, load: Load, masked: bool) -> dict[Sums, float]:
    grid, context_grid, extent, causal = case.geometry
    sides = (grid.cells, context_grid.cells, context_grid.cells)
    tensors = [load.random(cells, seed).requires_grad_() for seed, cells in enumerate(sides)]
    grad = load.random(grid.cells, 3)
    mask = torch.arange(context_grid.cells, device=load.device) % 3 > 0 if masked else None
    results = []
    for backend, kind in (("cuda", load.dtype), ("reference", torch.float32)):
        inputs = [t.detach().to(kind).requires_grad_() for t in tensors]
        output = nearby_attention(
            *inputs,
            grid=grid,
            context_grid=context_grid,
            extent=extent,
            causal=causal,
            context_mask=None if mask is None else mask.expand(load.batch, -1),
            backend=backend,  # type: ignore[arg-type]
        )
        gradients = torch.autograd.grad(output, inputs, grad.to(kind))
        results.append([t.detach().float() for t in (output, *gradients)])
    output, query, key, value = (
        float((ours - expected).norm() / expected.norm())
        for ours, expected in zip(*results, strict=True)
    )
    return {"outputs": output, "query gradients": query, "context gradients": max(key, value)}


def _show(reports: Sequence[dict[Sums, dict[str, object]]]) -> None:
    for sums in get_args(Sums):
        table = Table("layout", "registers", "spilled", "error", *_CASES, title=f"{sums}, µs")
        for report in reports:
            row = report[sums]
            times = row.get("microseconds") or {}
            assert isinstance(times, dict)
            error = row.get("failure") or row.get("error")
            table.add_row(
                str(row["layout"]),
                str(row["registers"]),
                str(row["spilled_bytes"]),
                f"{error:.1e}" if isinstance(error, float) else str(error or "–"),
                *(f"{times[case]:.0f}" if case in times else "–" for case in _CASES),
            )
        Console(width=120).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("kernel_layouts", __doc__)
    parser.add_argument(
        "--repeats", type=positive, default=12, metavar="N", help="times of a median (default: 12)"
    )
    parser.add_argument(
        "--build-only", action="store_true", help="tell registers, and time nothing"
    )
    add_output(parser)
    parser.add_argument("--candidate", type=whole_number(0), help=argparse.SUPPRESS)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
