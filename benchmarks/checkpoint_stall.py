"""How long a save of the 870 M state keeps training waiting, against a blocking save. Example:

OMP_NUM_THREADS=2 python -m benchmarks.checkpoint_stall --folder /tmp

One run saves the state three times: with training waiting until all is on the disk; beside the
forward pass of the next step; and with the optimizer step coming at once. Weights, master weights
and moments are bf16 (7 GiB, and as much for the copy), so that a machine of 24 GiB can hold both;
`--layout ds_configs/zero1_bf16.json` takes the whole fp32 state on a larger one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.options import (
    add_output,
    add_real_step,
    benchmark_parser,
    positive,
    real_recipe,
)
from benchmarks.harness.report import device_name, write_json
from benchmarks.harness.step_plan import Mix, StepPlan, planned_device, token_batches
from benchmarks.real_step import return_freed_memory, single_engine
from megatron_nuwa.command_line import output_folder
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.training.checkpoint import Checkpoints, read_manifest
from megatron_nuwa.training.hardware import allocated_gib
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.saving import Saver

HALF = {
    "parallel": {},
    "zero_optimization": {"stage": 1},
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    },
}
LARGEST_SHARE = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 when the stall beside a forward pass is 5 % or more."""
    options = _parser().parse_intermixed_args(arguments)
    recipe = real_recipe(options)
    return_freed_memory()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        join_processes() as processes,
    ):
        if processes.world_size > 1:
            raise UserError("benchmarks.checkpoint_stall runs in one process")
        layout = options.layout or Path(folder) / "layout.json"
        if options.layout is None:
            layout.write_text(json.dumps(HALF))
        plan = StepPlan(recipe, layout, planned_device(None, processes.device))
        images = Mix(clips=1, images=options.images, count=0).sizes(plan.model)
        batches = token_batches(plan.model, images)
        engine = single_engine(recipe, plan, processes.device, len(batches))
        _fill_moments(engine.deepspeed.optimizer.optimizer)
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1)
        saver = Saver(checkpoints, engine, processes, copy_bytes=1 << 50)

        started = time.perf_counter()
        saver.save(1, {})
        saver.wait_until_copied()
        saver.settle()
        blocking = time.perf_counter() - started

        started = time.perf_counter()
        engine.evaluate(batches)
        forward = time.perf_counter() - started

        stalls = {}
        for step, between in ((2, batches), (3, [])):
            started = time.perf_counter()
            saver.save(step, {})
            stall = time.perf_counter() - started
            if between:
                engine.evaluate(between)
            started = time.perf_counter()
            # The next optimizer step would change the state now.
            saver.wait_until_copied()
            stalls[step] = stall + time.perf_counter() - started
            saver.settle()
        [last] = checkpoints.all()
        size = sum(file["bytes"] for file in read_manifest(last).values())
        report: dict[str, Any] = {
            "device": device_name(processes.device),
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in engine.model.parameters()),
            "checkpoint_gib": size / 2**30,
            "peak_gib": allocated_gib(processes.device),
            "forward_seconds": forward,
            "seconds": {"blocking": blocking, "beside": stalls[2], "at once": stalls[3]},
            "of_blocking": {"beside": stalls[2] / blocking, "at once": stalls[3] / blocking},
        }
    _show(report)
    write_json(options.output, report)
    return 0 if options.dry_run or report["of_blocking"]["beside"] < LARGEST_SHARE else 1


def _fill_moments(adam: torch.optim.Optimizer) -> None:
    """Have Adam make its moments, without the memory of a backward pass."""
    parameters = [p for group in adam.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    adam.step()
    for parameter in parameters:
        parameter.grad = None


def _show(report: dict[str, Any]) -> None:
    title = (
        f"{report['parameters'] / 1e6:,.1f} M parameters, a checkpoint of "
        f"{report['checkpoint_gib']:.2f} GiB, {report['device']}"
    )
    table = Table(title=title)
    for column in ("training waits", "seconds", "of a blocking save"):
        table.add_column(column)
    for key, seconds in report["seconds"].items():
        name = {
            "blocking": "until all is on the disk",
            "beside": f"beside a forward pass of {report['forward_seconds']:.1f} s",
            "at once": "where the optimizer step comes at once",
        }[key]
        share = report["of_blocking"].get(key, 1.0)
        table.add_row(name, f"{seconds:.2f}", f"{share:.1%}")
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("checkpoint_stall", __doc__)
    add_real_step(parser)
    parser.add_argument("--folder", type=output_folder, help="a folder on the disk to be measured")
    parser.add_argument(
        "--images", type=positive, default=4, metavar="N", help="of the forward pass (default: 4)"
    )
    add_output(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
