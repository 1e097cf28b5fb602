"""Drawing samples of the model in training, which may cost the drawing and never the run."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_nuwa.data.batches import TaskName
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.monitor import Monitor
from megatron_nuwa.training.processes import Processes

# Shows pictures of the current model: (model, step, monitor, grids, frames a second), both by task.
ShowSamples = Callable[[Nuwa, int, Monitor, Mapping[str, Grid], Mapping[str, float | None]], None]


def draw_samples(
    show: ShowSamples,
    engine: Engine,
    processes: Processes,
    monitor: Monitor,
    step: int,
    corpora: Mapping[TaskName, Corpus],
) -> None:
    """Have the first process show the model as it is now, on the grids of the tasks' corpora.

    Every process must call it, and waits for the first. What fails there is told in one line, and
    the drawing left out. Where the weights lie on several processes they are gathered before; a
    failure of that communication is raised, because the others could not be told of it.
    """
    drawing = _Dispensable()
    weights: dict[str, Tensor] = {}

    def keep(name: str, weight: Tensor) -> None:
        weights[name] = weight.cpu()

    def draw() -> None:
        model = engine.model if engine.is_whole else _model_with(engine.model, weights)
        grids: dict[str, Grid] = {task: corpus.grid for task, corpus in corpora.items()}
        rates: dict[str, float | None] = {
            task: corpus.manifest.frames_per_second for task, corpus in corpora.items()
        }
        show(model.to(processes.device), step, monitor, grids, rates)

    if not engine.is_whole:
        for name, weight in engine.gathered_weights():
            drawing.attempt(partial(keep, name, weight))
    if processes.is_first:
        drawing.attempt(draw)
        if drawing.failure is not None:
            print(
                f"warning: the samples of step {step} are not drawn ({drawing.failure}); training "
                "goes on",
                flush=True,
            )
    processes.barrier()


class _Dispensable:
    """Work in parts, none of which is tried after the first has failed."""

    def __init__(self) -> None:
        self.failure: str | None = None

    def attempt(self, part: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            part()
        except Exception as error:
            # Words only: the error itself would keep its frames, and so the device's memory.
            self.failure = _in_one_line(error)


def _in_one_line(error: Exception) -> str:
    words = next(iter(str(error).splitlines()), "without a word")
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {words}, {Path(place.filename).name} line {place.lineno}"


def _model_with(of: Nuwa, weights: dict[str, Tensor]) -> Nuwa:
    with torch.device("meta"):
        model = Nuwa(of.config)
    model.load_state_dict(weights, assign=True)
    return model
