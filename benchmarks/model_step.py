"""Time a training step of the demo's model on each backend of nearby attention. Example:

OMP_NUM_THREADS=2 python -m benchmarks.model_step --steps 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness.options import add_output, add_recipe, benchmark_parser, positive
from benchmarks.harness.report import device_name, write_json
from megatron_nuwa.data.batches import TEXT_GRID
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.models import attention
from megatron_nuwa.models.nuwa import Context, Nuwa
from megatron_nuwa.ops import Backend, nearby_attention
from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.parallel.accelerator import default_device
from megatron_nuwa.training.recipe import Recipe, load_recipe

_LARGEST_LOSS_DIFFERENCE = 1e-4
_CLIP_FRAMES = 8

Batch = tuple[Context, Tensor, Grid]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 when the backends disagree."""
    options = _parser().parse_args(arguments)
    recipe = load_recipe(options.recipe)
    recipe.require("model", "data")
    device = default_device()
    batches = _batches(recipe, device)
    fused: Backend = "cuda" if device.type == "cuda" else "cpu"
    backends: tuple[Backend, ...] = ("reference", fused)
    results: dict[str, tuple[float, float]] = {}
    for name in backends:
        try:
            results[name] = _train(recipe, batches, name, options.steps, device)
        except ValueError as error:
            raise UserError(str(error)) from error

    slow, fast = results["reference"], results[fused]
    table = Table(title=f"Training step, {recipe.name} model · {device_name(device)}")
    for column in ("backend", "ms a step", "tokens/s", "loss after"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    tokens = sum(target.numel() for _, target, _ in batches)
    for backend, (milliseconds, loss) in results.items():
        speed = f"{tokens / milliseconds * 1e3:,.0f}"
        table.add_row(backend, f"{milliseconds:.0f}", speed, f"{loss:.5f}")
    console = Console()
    console.print(table)
    console.print(f"{fused} is {slow[0] / fast[0]:.2f}× as fast as reference", highlight=False)
    if options.output is not None:
        _write(options.output, recipe, device, results)
    return 0 if abs(slow[1] - fast[1]) <= _LARGEST_LOSS_DIFFERENCE * abs(slow[1]) else 1


def _batches(recipe: Recipe, device: torch.device) -> list[Batch]:
    """One batch a task with the recipe's sizes, of random tokens: speed does not depend on them."""
    assert recipe.model is not None
    assert recipe.data is not None
    model = recipe.model
    generator = torch.Generator().manual_seed(0)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator).to(device)

    h, w, frames = model.position_grid
    batches = []
    for task, settings in recipe.data.tasks.items():
        size = settings.batch_size
        grid = Grid(h, w, 1 if task.endswith("i") else min(frames, _CLIP_FRAMES))
        mask = torch.arange(TEXT_GRID.cells, device=device).expand(size, -1) < 12
        words = random(model.text_vocabulary, size, TEXT_GRID.cells)
        context = Context("text", words, TEXT_GRID, mask)
        batches.append((context, random(model.codebook_size, size, grid.cells), grid))
    return batches


def _train(
    recipe: Recipe, batches: Sequence[Batch], backend: Backend, steps: int, device: torch.device
) -> tuple[float, float]:
    """Median milliseconds of a step, and the loss after the last one."""
    assert recipe.model is not None
    torch.manual_seed(recipe.seed)
    model = Nuwa(recipe.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    times, loss = [], 0.0
    with _forced(backend):
        for _ in range(steps + 1):
            started = time.perf_counter()
            loss = 0.0
            for context, target, grid in batches:
                part = model.loss(context, target, grid)
                part.backward()
                loss += float(part.detach())
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - started) * 1e3)
    # The first step builds tables and warms caches.
    return statistics.median(times[1:]), loss


@contextmanager
def _forced(backend: Backend) -> Iterator[None]:
    """Have every window computed by one backend; what is dense stays with PyTorch for all."""

    def attend(*tensors: Tensor, **settings: Any) -> Tensor:
        grid, context_grid = settings["grid"], settings["context_grid"]
        geometry = Geometry(grid, context_grid, Extent(*settings["extent"]), settings["causal"])
        chosen = "auto" if geometry.sees_everything else backend
        return nearby_attention(*tensors, **settings, backend=chosen)

    with patch.object(attention, "nearby_attention", attend):
        yield


def _write(
    path: Path, recipe: Recipe, device: torch.device, results: dict[str, tuple[float, float]]
) -> None:
    report = {
        "device": device_name(device),
        "torch": torch.__version__,
        "recipe": recipe.name,
        "backends": {
            name: {"step_ms": milliseconds, "loss": loss}
            for name, (milliseconds, loss) in results.items()
        },
    }
    write_json(path, report)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("model_step", __doc__)
    add_recipe(parser, "demo", "model and batch sizes")
    parser.add_argument(
        "--steps", type=positive, default=7, metavar="N", help="timed steps (default: 7)"
    )
    add_output(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
