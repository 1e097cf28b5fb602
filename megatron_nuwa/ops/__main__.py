"""`python -m megatron_nuwa.ops`: the backends that are here, and whether they are right."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_nuwa.command_line import CommandParser
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.grid import Extent, Grid, nearby_indices
from megatron_nuwa.ops import cpu, nearby_attention
from megatron_nuwa.ops.backends import BACKENDS
from megatron_nuwa.ops.native import build_report, why_missing
from megatron_nuwa.ops.tables import Geometry

_GEOMETRIES = (
    Geometry(Grid(5, 7, 3), Grid(5, 7, 3), Extent(3, 3, 3), True),
    Geometry(Grid(5, 7, 3), Grid(3, 4, 2), Extent(3, 5, 1), False),
    Geometry(Grid(4, 3, 2), Grid(1, 1, 77), Extent(1, 1, 31), False),
)
# Largest error, relative to the largest entry of the tensor.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def main() -> int:
    """Print the table and the self-check; 0 when everything that is available is right."""
    parser = CommandParser(
        prog="python -m megatron_nuwa.ops",
        description="Show the backends of nearby attention and check them against brute force.",
        example="CUDA_VISIBLE_DEVICES=0 python -m megatron_nuwa.ops",
    )
    parser.parse_args()
    try:
        _ = why_missing("cpu") or cpu.instruction_set()
    except ValueError as problem:
        raise UserError(str(problem)) from None
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_overview())
    results = Table("self-check", "dtype", "largest relative error", "allowed", "")
    all_right = True
    for name, dtype, error in _checks():
        is_right = error <= _TOLERANCES[dtype]
        all_right &= is_right
        verdict = "right" if is_right else "WRONG"
        allowed = f"{_TOLERANCES[dtype]:.0e}"
        results.add_row(name, str(dtype).removeprefix("torch."), f"{error:.1e}", allowed, verdict)
    console.print(results)
    return 0 if all_right else 1


def _overview() -> Table:
    table = Table("backend", "available", "detail")
    report = build_report()
    table.add_row("reference", "yes", "PyTorch; every dtype and device")
    reason = why_missing("cpu")
    if reason is None:
        sets = cpu.available_instruction_sets()
        detail = f"instructions: {cpu.instruction_set()} (of {', '.join(sets)}); float32, bfloat16"
    table.add_row("cpu", "yes" if reason is None else "no", reason or detail)
    compiled = ", ".join(report.get("cuda_architectures", []))
    reason = _why_no_cuda()
    detail = f"compiled for {compiled or 'unknown architectures'}"
    if reason is None:
        detail += f"; {torch.cuda.get_device_name()}; float32, bfloat16, float16"
    elif why_missing("cuda") is None:
        reason = f"{reason}; {detail}"
    table.add_row("cuda", "yes" if reason is None else "no", reason or detail)
    return table


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        missing = why_missing("cuda")
        return missing or "torch sees no CUDA device"
    reason: str | None = BACKENDS["cuda"].why_not(torch.empty(1, 1, 1, 32, device="cuda"))
    return reason


def _checks() -> Iterator[tuple[str, torch.dtype, float]]:
    """Backend, dtype and largest error of each one that is available."""
    yield "reference", torch.float32, _error("reference", torch.float32, "cpu")
    for instructions in cpu.available_instruction_sets():
        for dtype in cpu.DTYPES:
            with _instructions(instructions):
                yield f"cpu, {instructions}", dtype, _error("cpu", dtype, "cpu")
    if _why_no_cuda() is None:
        for dtype in _TOLERANCES:
            yield "cuda", dtype, _error("cuda", dtype, "cuda")


@contextmanager
def _instructions(name: str) -> Iterator[None]:
    before = os.environ.get(cpu.INSTRUCTION_SET_VARIABLE)
    os.environ[cpu.INSTRUCTION_SET_VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[cpu.INSTRUCTION_SET_VARIABLE]
        if before is not None:
            os.environ[cpu.INSTRUCTION_SET_VARIABLE] = before


def _error(backend: str, dtype: torch.dtype, device: str) -> float:
    """Largest error of output and gradients over all geometries, relative to largest entries."""
    worst = 0.0
    for seed, geometry in enumerate(_GEOMETRIES):
        generator = torch.Generator().manual_seed(seed)
        cells = (geometry.grid.cells, geometry.context_grid.cells, geometry.context_grid.cells)
        stored = [torch.randn(2, n, 2, 64, generator=generator).to(dtype) for n in cells]
        grad = torch.randn(stored[0].shape, generator=generator).to(dtype)
        ours = [t.to(device).requires_grad_() for t in stored]
        output = nearby_attention(
            *ours,
            grid=geometry.grid,
            context_grid=geometry.context_grid,
            extent=geometry.extent,
            causal=geometry.causal,
            backend=backend,  # type: ignore[arg-type]
        )
        wide = [t.double().requires_grad_() for t in stored]
        expected = _brute_force(wide, geometry)
        pairs = zip(
            (output, *torch.autograd.grad(output, ours, grad.to(device))),
            (expected, *torch.autograd.grad(expected, wide, grad.double())),
            strict=True,
        )
        for got, wanted in pairs:
            got, wanted = got.detach().double().cpu(), wanted.detach()
            error = (got - wanted).abs().max() / wanted.abs().max()
            # A comparison with NaN is false, so a NaN must not be able to hide in a maximum.
            worst = max(worst, float(error.nan_to_num(torch.inf)))
    return worst


@cache
def _seen(n: int, geometry: Geometry) -> list[int]:
    return nearby_indices(n, *geometry)


def _brute_force(tensors: list[Tensor], geometry: Geometry) -> Tensor:
    query, key, value = tensors
    rows = []
    for n in range(geometry.grid.cells):
        seen = _seen(n, geometry)
        scores = torch.einsum("bhd,bmhd->bhm", query[:, n], key[:, seen])
        weights = (scores * query.shape[-1] ** -0.5).softmax(-1)
        rows.append(torch.einsum("bhm,bmhd->bhd", weights, value[:, seen]))
    return torch.stack(rows, 1)


if __name__ == "__main__":
    sys.exit(run_command(main))
