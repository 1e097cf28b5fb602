"""Take optimizer steps of the real 870 M recipe: speed, MFU and memory beside `plan`'s. Examples:

OMP_NUM_THREADS=2 python -m benchmarks.real_step --output benchmarks/results/real_step_cpu.json
python -m benchmarks.real_step --largest --clips 2 --images 4 --clip-batches 4 --profile \\
    training.checkpoint_activations=none training.compile=true      # on a GPU

Videos and images of random tokens, bf16 with fp32 gradients and master weights. The second step is
the first with all of the optimizer's state. Without a GPU it needs 22 GiB, and some minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.kernels import profiled, show_profile
from benchmarks.harness.largest import largest_mix
from benchmarks.harness.options import (
    add_output,
    add_real_step,
    benchmark_parser,
    positive,
    real_recipe,
)
from benchmarks.harness.report import device_name, write_json
from benchmarks.harness.step_plan import Mix, StepPlan, planned_device, token_batches
from megatron_nuwa.command_line import whole_number
from megatron_nuwa.data.batches import TokenBatch
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.ops import backends
from megatron_nuwa.parallel.groups import find_place
from megatron_nuwa.plan.candidates import Judged
from megatron_nuwa.plan.devices import GIB
from megatron_nuwa.plan.timing import step_flops
from megatron_nuwa.training.building import build_engine, complete_config
from megatron_nuwa.training.compiling import check_compile
from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.hardware import allocated_gib
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.recipe import Recipe

_WIDTH = 150
# Of glibc's malloc.h.
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Step:
    """One optimizer step: seconds in all and of the update alone, and the peak memory so far."""

    seconds: float
    update_seconds: float
    loss: float
    peak_gib: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 when the loss is not finite."""
    options = _parser().parse_intermixed_args(arguments)
    recipe = real_recipe(options)
    assert recipe.model is not None
    return_freed_memory()
    with join_processes() as processes:
        if processes.world_size > 1:
            raise UserError("benchmarks.real_step runs in one process; start it without a launcher")
        device = processes.device
        if device.type != "cuda" and (options.largest or options.profile):
            raise UserError("--largest and --profile need a GPU, and torch sees none")
        plan = StepPlan(recipe, options.layout, planned_device(options.device, device))
        check_compile(recipe.training, plan.layout, device)
        _say_what_runs(recipe, device)
        mix = Mix(options.clips, options.images, options.clip_batches)
        engine = single_engine(recipe, plan, device, len(mix.sizes(recipe.model)))
        if options.largest:
            mix = largest_mix(engine, plan, mix, lambda batches: _step(engine, batches))
        batches = token_batches(recipe.model, mix.sizes(recipe.model))
        on_gpu = device.type == "cuda"
        warm_up = options.warm_up if options.warm_up is not None else 2 * on_gpu
        steps = []
        for number in range(-warm_up, options.steps or (5 if on_gpu else 2)):
            if number == 0 and on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            steps.append(_step(engine, batches))
            name = f"step {number + 1}" if number >= 0 else "warm-up"
            print(f"{name}: {asdict(steps[-1])}", flush=True)
        report = _report(recipe, device, engine, steps[warm_up:], plan.judge(mix), plan.peak)
        _show(report)
        write_json(options.output, report)
        if options.profile:
            profile = profiled(lambda: _step(engine, batches))
            show_profile(Console(width=_WIDTH), profile)
            report["profile"] = asdict(profile)
            write_json(options.output, report)
    return 0 if all(map(_is_finite, steps)) else 1


def return_freed_memory() -> None:
    """Have every tensor of 1 MiB and more go back to the system when it is freed.

    Left alone, glibc raises that limit to 32 MiB by itself and keeps 2 GiB of holes between the
    gradients of the 870 M model, which a 24 GiB machine can ill spare.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _say_what_runs(recipe: Recipe, device: torch.device) -> None:
    print(f"torch {torch.__version__} on {device_name(device)}")
    why_not = backends.cuda.why_not(torch.empty(0, 0, 1, 64, dtype=torch.bfloat16, device=device))
    if device.type == "cuda":
        print(f"nearby attention {'cuda' if why_not is None else f'SLOW, not cuda: {why_not}'}")
    settings = recipe.training
    print(f"recompute {settings.checkpoint_activations}, compile {settings.compile}", flush=True)


def single_engine(
    recipe: Recipe, plan: StepPlan, device: torch.device, micro_batches: int
) -> Engine:
    """The engine of a pretraining.

    The weights are made in fp32 and DeepSpeed casts them one by one, so building needs less than
    training: 3.5 GiB of the 870 M model's before the state of the step exists.
    """
    config = complete_config(plan.deepspeed, micro_batches, 1, recipe)
    place = find_place(plan.layout)
    return build_engine(recipe, place, config, device, unit_costs=(), codebook=None)


def _step(engine: Engine, batches: Sequence[TokenBatch]) -> Step:
    started = _now(engine.device)
    update = _Timed(engine.deepspeed.optimizer, engine.device)
    engine.train_step(batches, seed=0)
    seconds = _now(engine.device) - started
    loss = sum(float(loss.mean) * loss.share for loss in engine.losses())
    return Step(seconds, update.seconds, loss, allocated_gib(engine.device))


class _Timed:
    """Seconds in an optimizer's next update."""

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self.seconds = 0.0
        self._optimizer, self._step, self._device = optimizer, optimizer.step, device
        optimizer.step = self._run

    def _run(self, *arguments: Any, **settings: Any) -> Any:
        # A pretraining waits here, too: it reads the losses before it takes the step.
        started = _now(self._device)
        result = self._step(*arguments, **settings)
        self.seconds = _now(self._device) - started
        self._optimizer.step = self._step
        return result


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _is_finite(step: Step) -> bool:
    return bool(torch.isfinite(torch.tensor(step.loss)))


def _report(
    recipe: Recipe,
    device: torch.device,
    engine: Engine,
    steps: Sequence[Step],
    expected: Judged,
    peak_flops: float,
) -> dict[str, Any]:
    peak = max(step.peak_gib for step in steps)
    predicted = expected.memory.total / GIB
    memory = {}
    # The framework's share of a GPU is not PyTorch's to count.
    if device.type == "cuda":
        predicted -= expected.memory.framework / GIB
        free, whole = torch.cuda.mem_get_info(device)
        memory = {
            "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
            "device_used_gib": (whole - free) / GIB,
            "device_gib": whole / GIB,
        }
    seconds = median_low(step.seconds for step in steps)
    tokens = sum(batch.tokens for batch in expected.step.micro_batches)
    forward, backward, _ = step_flops(expected.step)
    rate = (forward + backward) / seconds
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recipe": recipe.name,
        "layout": expected.layout.name,
        "recomputation": expected.recomputation,
        "compile": recipe.training.compile,
        "parameters": sum(p.numel() for p in engine.model.parameters()),
        "micro_batches": [
            {"task": batch.task, "samples": batch.samples, "grid": list(batch.grid)}
            for batch in expected.step.micro_batches
        ],
        "steps": [asdict(step) for step in steps],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "model_flops": forward + backward,
        "flops_per_second": rate,
        "mfu": rate / peak_flops,
        "peak_gib": peak,
        **memory,
        "predicted_gib": predicted,
        "predicted_over_measured": predicted / peak,
        "predicted_parts_gib": {part: size / GIB for part, size in asdict(expected.memory).items()},
        "predicted_seconds": expected.timing.step,
        "predicted_tokens_per_second": expected.timing.tokens_per_second,
        "predicted_mfu": expected.timing.mfu,
    }


def _show(report: dict[str, Any]) -> None:
    title = f"{report['recipe']}, {report['parameters'] / 1e6:,.1f} M, {report['device']}"
    table = Table(title=title)
    for column in ("", "measured", "plan", "plan / measured"):
        table.add_column(column, justify="right" if column else "left")
    rows = (
        ("peak memory, GiB", report["peak_gib"], report["predicted_gib"], ",.2f"),
        ("step, s", report["seconds"], report["predicted_seconds"], ",.3f"),
        ("tokens/s", report["tokens_per_second"], report["predicted_tokens_per_second"], ",.0f"),
        ("MFU", report["mfu"], report["predicted_mfu"], ".1%"),
    )
    for name, measured, predicted, form in rows:
        ratio = f"{predicted / measured:.3f}"
        table.add_row(name, f"{measured:{form}}", f"{predicted:{form}}", ratio)
    Console(width=_WIDTH).print(table)
    sizes = ", ".join(f"{b['samples']} {b['task']}" for b in report["micro_batches"])
    print(f"micro-batches: {sizes}; {report['flops_per_second'] / 1e12:.1f} TFLOP/s", flush=True)
    if "device_gib" in report:
        print(
            f"PyTorch reserved {report['reserved_gib']:.2f} GiB; "
            f"{report['device_used_gib']:.2f} of {report['device_gib']:.2f} GiB in use",
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("real_step", __doc__)
    add_real_step(parser, "zero1_bf16")
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="plan's name of the device (default: the one that this looks like)",
    )
    for name, of, count in (
        ("clips", "clips a micro-batch", 1),
        ("clip-batches", "micro-batches of clips a step", 1),
    ):
        parser.add_argument(
            f"--{name}",
            type=positive,
            default=count,
            metavar="N",
            help=f"{of} (default: {count})",
        )
    parser.add_argument(
        "--images",
        type=whole_number(0),
        default=10,
        metavar="N",
        help="images in the step's one micro-batch of them; 0 for none (default: 10)",
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="timed steps (default: 5 on a GPU, else 2)"
    )
    parser.add_argument(
        "--warm-up",
        type=whole_number(0),
        metavar="N",
        help="steps before (default: 2 on a GPU, else 0)",
    )
    parser.add_argument(
        "--largest",
        action="store_true",
        help="find out how many clips fit in a micro-batch and take those, with --images for each "
        "--clips of them",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="one more step, and its kernels",
    )
    add_output(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
