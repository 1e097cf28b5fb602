"""Pretraining runs on worlds of several processes, many runs a start of the processes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from observed import observed

from megatron_nuwa.generation.show import make_sample_shower
from megatron_nuwa.training.launcher import free_port
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.processes import Processes, join_processes
from megatron_nuwa.training.recipe import load_recipe

FIGURES = ("train/loss", "train/loss/t2i", "train/loss/v2v", "train/loss/t2v", "train/grad_norm")


@dataclass(frozen=True)
class Scenario:
    """One run: a name for its folder, the layout file's contents, and changes of the recipe.

    With `observe` its processes note what `observed.read_observed` returns; `disturb` then names a
    weight that the last process changes after the last of ten steps.
    """

    name: str
    layout: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    observe: bool = False
    disturb: str | None = None

    def folder(self, root: Path) -> Path:
        """Where the run lies."""
        return root / self.name


def layout(pipeline: int = 1, tensor: int = 1, zero: int = 1, **more: Any) -> dict[str, Any]:
    """Contents of a layout file; `bf16=True`, `sequence_parallel` and `cut` among `more`."""
    parallel: dict[str, Any] = {"pipeline": pipeline, "tensor": tensor}
    for name in ("sequence_parallel", "cut"):
        if name in more:
            parallel[name] = more.pop(name)
    contents: dict[str, Any] = {"parallel": parallel, "zero_optimization": {"stage": zero}}
    if more.pop("bf16", False):
        contents["bf16"] = {"enabled": True, "immediate_grad_update": True}
        contents["data_types"] = {"grad_accum_dtype": "fp32"}
    return contents


def run_world(recipe: Path, root: Path, processes: int, scenarios: Sequence[Scenario]) -> None:
    """Start processes once and let them carry out all runs, in `root`."""
    root.mkdir(parents=True, exist_ok=True)
    arguments = (processes, free_port(), recipe, root, tuple(scenarios))
    mp.spawn(_process, args=arguments, nprocs=processes, join=True)


def figures(run: Path) -> list[list[float]]:
    """`FIGURES` of every logged step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[line[tag] for tag in FIGURES] for line in lines if "train/loss" in line]


def held_out(run: Path) -> dict[str, float]:
    """The last evaluation's loss of every task."""
    tasks = json.loads((run / "evaluation.json").read_text())["heldout"]["tasks"]
    return {task: values["loss_nats"] for task, values in tasks.items()}


def _process(
    rank: int, processes: int, port: int, recipe: Path, root: Path, scenarios: Sequence[Scenario]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    with join_processes() as joined:
        for scenario in scenarios:
            carry_out(scenario, recipe, root, joined)


def carry_out(scenario: Scenario, recipe: Path, root: Path, processes: Processes) -> None:
    """One run, by processes that exist already."""
    path = root / f"{scenario.name}.json"
    if processes.is_first:
        path.write_text(json.dumps(scenario.layout))
    processes.barrier()
    settings = load_recipe(recipe, [f"run={scenario.folder(root)}", *scenario.overrides])
    run = scenario.folder(root)
    with observed(run, processes, scenario.disturb) if scenario.observe else nullcontext():
        pretrain(settings, path, processes, make_sample_shower(settings))
        processes.barrier()
