"""What a start of a pretraining checks and opens before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nuwa.parallel.deepspeed_config import check_deepspeed_config
from megatron_nuwa.parallel.layout import Layout, check_layout, read_layout
from megatron_nuwa.training import resume
from megatron_nuwa.training.compiling import check_compile
from megatron_nuwa.training.fine_tuning import StartWeights, find_source, fit
from megatron_nuwa.training.inputs import Inputs, check_batches, open_inputs
from megatron_nuwa.training.name_patterns import check_frozen
from megatron_nuwa.training.preflight import preflight
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.recipe import Recipe

# Bytes that one process needs on its device, for a layout and its DeepSpeed config.
MemoryNeeded = Callable[[Layout, dict[str, Any]], int]


@dataclass(frozen=True)
class Prepared:
    """A start that fits: its layout, its open inputs, and where it begins."""

    layout: Layout
    config: dict[str, Any]
    inputs: Inputs
    start: resume.Start
    weights: StartWeights | None


def read_whole_layout(
    recipe: Recipe, layout_path: Path, processes: Processes
) -> tuple[Layout, dict[str, Any]]:
    """The layout and DeepSpeed's part of its file, held against the recipe on every process."""

    def read() -> tuple[Layout, dict[str, Any]]:
        recipe.require("run", "model", "tokenizers", "data")
        assert recipe.model is not None
        assert recipe.data is not None
        settings, config = read_layout(layout_path)
        check_deepspeed_config(config, f"DeepSpeed config {layout_path}")
        layout = check_layout(settings, config, recipe.model, processes.world_size)
        check_compile(recipe.training, layout, processes.device)
        check_batches(recipe.data, layout.data)
        return layout, config

    return processes.first_then_all(read)


def prepare(
    recipe: Recipe,
    layout: Layout,
    config: dict[str, Any],
    processes: Processes,
    memory_needed: MemoryNeeded | None,
    go_on: Callable[[], None],
) -> Prepared:
    """Check the nodes, find the checkpoint to continue from, and open everything that is read.

    Every process calls it. `go_on` is called between what may take long. Raises `UserError` for
    the first thing that does not fit.
    """

    def check() -> tuple[Inputs, resume.Start, StartWeights | None]:
        assert recipe.model is not None
        check_frozen(recipe.optimizer.frozen, recipe.model)
        inputs = open_inputs(recipe)
        description = resume.describe(recipe, layout, config, inputs)
        start = resume.find_start(recipe, description, found)
        return inputs, start, fit(source, recipe, inputs)

    go_on()
    needs = None if memory_needed is None else memory_needed(layout, config)
    for warning in preflight(recipe, layout, processes, bytes_needed=needs):
        if processes.is_first:
            print(f"warning: {warning}", flush=True)
    go_on()
    found = processes.first_tells(lambda: resume.find_newest(recipe))
    go_on()
    source = None if found[0] else processes.first_tells(lambda: find_source(recipe))
    inputs, start, weights = processes.first_then_all(check)
    go_on()
    return Prepared(layout, config, inputs, start, weights)
