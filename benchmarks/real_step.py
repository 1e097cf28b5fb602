"""Take optimizer steps of the real 870 M recipe and hold `plan`'s memory against them. Example:

OMP_NUM_THREADS=2 python -m benchmarks.real_step --output benchmarks/results/real_step_cpu.json

One video and ten images a step, random tokens, bf16 with fp32 gradients and master weights. The
second step is the first with all of the optimizer's state. It needs 22 GiB on a machine without a
GPU, and some minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.options import positive
from benchmarks.harness.report import device_name, file_stem
from megatron_nuwa.data.batches import TEXT_GRID, TaskName, TokenBatch
from megatron_nuwa.data.text import text_mask
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.grid import Grid
from megatron_nuwa.parallel.groups import find_place
from megatron_nuwa.parallel.layout import check_layout, read_layout
from megatron_nuwa.plan.candidates import Judged, Machine, judge_batches
from megatron_nuwa.plan.devices import GIB, device_named
from megatron_nuwa.plan.workload import MicroBatch
from megatron_nuwa.training.building import build_engine, complete_config
from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.hardware import allocated_gib
from megatron_nuwa.training.processes import Processes, join_processes
from megatron_nuwa.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
_WORDS = 12
# Of glibc's malloc.h.
_M_MMAP_THRESHOLD = -3
# The same run at a size of seconds, for `--dry-run`.
SMALL = (
    "model.width=64",
    "model.heads=4",
    "model.encoder_layers=2",
    "model.decoder_layers=3",
    "model.codebook_size=96",
    "model.code_dim=16",
    "model.text_vocabulary=128",
    "model.position_grid=[6,6,4]",
)


@dataclass(frozen=True)
class Step:
    """One optimizer step: seconds in all and of the update alone, and the peak memory so far."""

    seconds: float
    update_seconds: float
    loss: float
    peak_gib: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 when the loss is not finite."""
    options = _parser().parse_args(arguments)
    recipe = load_recipe(options.recipe, SMALL if options.dry_run else ())
    recipe.require("model", "data")
    return_freed_memory()
    with join_processes() as processes:
        if processes.world_size > 1:
            raise UserError("benchmarks.real_step runs in one process; start it without a launcher")
        batches = random_batches(recipe, options.clips, options.images)
        expected = _expected(recipe, options.layout, options.device, processes, batches)
        engine = single_engine(recipe, options.layout, processes, len(batches))
        steps = []
        for number in range(options.steps):
            steps.append(_step(engine, batches))
            print(f"step {number + 1}: {asdict(steps[-1])}", flush=True)
    report = _report(recipe, processes.device, engine, steps, expected)
    _show(report)
    if options.output is not None:
        write_text_atomically(options.output, json.dumps(report, indent=1) + "\n")
    return 0 if all(map(_is_finite, steps)) else 1


def return_freed_memory() -> None:
    """Have every tensor of 1 MiB and more go back to the system when it is freed.

    Left alone, glibc raises that limit to 32 MiB by itself and keeps 2 GiB of holes between the
    gradients of the 870 M model, which a 24 GiB machine can ill spare.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _expected(
    recipe: Recipe,
    layout_path: Path,
    device: str | None,
    processes: Processes,
    batches: Sequence[TokenBatch],
) -> Judged:
    """What `plan` says of these micro-batches in one process."""
    assert recipe.model is not None
    settings, deepspeed = read_layout(layout_path)
    layout = check_layout(settings, deepspeed, recipe.model, 1)
    name = device or ("h100-80gb" if processes.device.type == "cuda" else "cpu")
    sizes = [MicroBatch(batch.task, len(batch.target), batch.grid) for batch in batches]
    return judge_batches(recipe, layout, deepspeed, Machine(device_named(name), 1, 1), sizes)


def single_engine(recipe: Recipe, layout: Path, processes: Processes, micro_batches: int) -> Engine:
    """The engine of a pretraining.

    The weights are made in fp32 and DeepSpeed casts them one by one, so building needs less than
    training: 3.5 GiB of the 870 M model's before the state of the step exists.
    """
    assert recipe.model is not None
    settings, deepspeed = read_layout(layout)
    place = find_place(check_layout(settings, deepspeed, recipe.model, 1))
    clipping = recipe.optimizer.gradient_clipping
    config = complete_config(deepspeed, micro_batches, 1, clipping)
    return build_engine(recipe, place, config, processes.device, unit_costs=(), codebook=None)


def random_batches(recipe: Recipe, clips: int, images: int) -> list[TokenBatch]:
    """Random tokens of one task each: what is learned does not matter here."""
    assert recipe.model is not None
    model = recipe.model
    h, w, frames = model.position_grid
    generator = torch.Generator().manual_seed(0)

    def batch(task: TaskName, samples: int, grid: Grid) -> TokenBatch:
        words = torch.zeros(samples, TEXT_GRID.cells, dtype=torch.int64)
        words[:, :_WORDS] = torch.randint(
            1, model.text_vocabulary, (samples, _WORDS), generator=generator
        )
        shape = (samples, grid.cells)
        target = torch.randint(0, model.codebook_size, shape, generator=generator)
        return TokenBatch(task, words, target, grid, torch.from_numpy(text_mask(words.numpy())))

    return [batch("v2v", clips, Grid(h, w, frames)), batch("t2i", images, Grid(h, w, 1))]


def _step(engine: Engine, batches: Sequence[TokenBatch]) -> Step:
    started = time.perf_counter()
    update = _Timed(engine.deepspeed.optimizer)
    engine.train_step(batches, seed=0)
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    seconds = time.perf_counter() - started
    loss = sum(float(loss.mean) for loss in engine.losses())
    return Step(seconds, update.seconds, loss, allocated_gib(engine.device))


class _Timed:
    """Seconds in an optimizer's next update."""

    def __init__(self, optimizer: Any) -> None:
        self.seconds = 0.0
        self._optimizer, self._step = optimizer, optimizer.step
        optimizer.step = self._run

    def _run(self, *arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        result = self._step(*arguments, **settings)
        self.seconds = time.perf_counter() - started
        self._optimizer.step = self._step
        return result


def _is_finite(step: Step) -> bool:
    return bool(torch.isfinite(torch.tensor(step.loss)))


def _report(
    recipe: Recipe, device: torch.device, engine: Engine, steps: Sequence[Step], expected: Judged
) -> dict[str, Any]:
    peak = max(step.peak_gib for step in steps)
    predicted = expected.memory.total / GIB
    # The framework's share of a GPU is not PyTorch's to count.
    if device.type == "cuda":
        predicted -= expected.memory.framework / GIB
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recipe": recipe.name,
        "layout": expected.layout.name,
        "recomputation": expected.recomputation,
        "parameters": sum(p.numel() for p in engine.model.parameters()),
        "micro_batches": [
            {"task": batch.task, "samples": batch.samples, "grid": list(batch.grid)}
            for batch in expected.step.micro_batches
        ],
        "steps": [asdict(step) for step in steps],
        "peak_gib": peak,
        "predicted_gib": predicted,
        "predicted_over_measured": predicted / peak,
        "predicted_parts_gib": {part: size / GIB for part, size in asdict(expected.memory).items()},
        "predicted_seconds": expected.timing.step,
    }


def _show(report: dict[str, Any]) -> None:
    title = f"{report['recipe']}, {report['parameters'] / 1e6:,.1f} M, {report['device']}"
    table = Table(title=title)
    for column in ("", "measured", "plan", "plan / measured"):
        table.add_column(column, justify="right" if column else "left")
    seconds = min(step["seconds"] for step in report["steps"])
    rows = (
        ("peak memory, GiB", report["peak_gib"], report["predicted_gib"]),
        ("fastest step, s", seconds, report["predicted_seconds"]),
    )
    for name, measured, predicted in rows:
        ratio = f"{predicted / measured:.3f}"
        table.add_row(name, f"{measured:,.2f}", f"{predicted:,.2f}", ratio)
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    default = f"benchmarks/results/real_step_{file_stem(torch.device('cpu'))}.json"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_step",
        description="Time and peak memory of an optimizer step of the real recipe, and plan's.",
        epilog="example:\n\nOMP_NUM_THREADS=2 python -m benchmarks.real_step --output FILE",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        default=ROOT / "launch/recipes/nuwa_870m.yaml",
        help="whose model (default: the 870 M)",
    )
    parser.add_argument(
        "--layout",
        type=Path,
        default=ROOT / "ds_configs/zero1_bf16.json",
        metavar="FILE",
        help="DeepSpeed layout (default: ds_configs/zero1_bf16.json)",
    )
    parser.add_argument("--device", metavar="NAME", help="plan's name of a GPU, when on one")
    for name, number in (("steps", 2), ("clips", 1), ("images", 10)):
        parser.add_argument(
            f"--{name}", type=positive, default=number, metavar="N", help=f"default: {number}"
        )
    parser.add_argument("--dry-run", action="store_true", help="a small model, for a trial")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"JSON to write, such as {default}"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
