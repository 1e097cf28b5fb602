"""The eight tasks: what the encoder reads, what is given of the picture, what is made new.

| task | encoder reads | given |
|---|---|---|
| t2i, t2v | text | nothing |
| s2i, s2v | sketch | nothing |
| i2i | "None" | the image outside the region |
| v2v | "None" | the first frames |
| ti2i, tv2v | text | the image or clip outside the region |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_nuwa.data.text import NO_CAPTION
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.regions import touched
from megatron_nuwa.generation.sampling import SamplingSettings, generate_tokens
from megatron_nuwa.generation.trained import Generator
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context


@dataclass(frozen=True)
class Task:
    """One of the eight: what it writes, what the encoder reads, and what is given beforehand."""

    name: str
    title: str
    target: Literal["image", "clip"]
    reads: Literal["text", "sketch", "none"]
    given: Literal["nothing", "frames", "region"]

    @property
    def media(self) -> Literal["image", "clip"] | None:
        """What must be given with it, if anything."""
        return None if self.given == "nothing" else self.target


TASKS = {
    task.name: task
    for task in (
        Task("t2i", "text to image", "image", "text", "nothing"),
        Task("s2i", "sketch to image", "image", "sketch", "nothing"),
        Task("i2i", "image completion", "image", "none", "region"),
        Task("ti2i", "image manipulation by text", "image", "text", "region"),
        Task("t2v", "text to video", "clip", "text", "nothing"),
        Task("s2v", "sketch to video", "clip", "sketch", "nothing"),
        Task("v2v", "video prediction", "clip", "none", "frames"),
        Task("tv2v", "video manipulation by text", "clip", "text", "region"),
    )
}


@dataclass(frozen=True)
class Request:
    """One thing to generate.

    `pixels` uint8 (frames, rows, columns, 3), of the model's size: the image or clip that is
    changed, or the frames that are continued. `region` bool (frames or 1, rows, columns): the
    pixels that are made new; every cell that it touches is. `sketch`: class numbers (frames or 1,
    rows, columns).
    """

    task: Task
    seed: int = 0
    prompt: str = NO_CAPTION
    pixels: np.ndarray | None = None
    region: np.ndarray | None = None
    sketch: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """What came of a request: `frames` uint8 (frames, rows, columns, 3).

    `origin` is what its files say about themselves: task, prompt, seed, checkpoint, settings.
    """

    request: Request
    frames: np.ndarray
    origin: dict[str, object]


@dataclass(frozen=True)
class Prepared:
    """Requests of one task, as the sampler takes them; cells where `is_known` is True are kept."""

    grid: Grid
    seeds: list[int]
    context: Context
    without_text: Context
    known: Tensor | None
    is_known: Tensor | None


def task_named(name: str) -> Task:
    """The task of that name; `UserError` that lists them for a name that is none."""
    task = TASKS.get(name.lower())
    if task is None:
        near = difflib.get_close_matches(name.lower(), TASKS, 1, 0.5)
        hint = f"did you mean {near[0]}? All" if near else "all"
        raise UserError(f"task '{name}' is unknown; {hint} are {', '.join(TASKS)}")
    return task


def grid_of(generator: Generator, task: Task) -> Grid:
    """The grid of what a task writes."""
    return generator.image_grid if task.target == "image" else generator.clip_grid


def prepare(generator: Generator, requests: Sequence[Request]) -> Prepared:
    """What the sampler needs for requests of the same task.

    Raises `UserError` for a prompt that is empty or too long, for media of another size or length
    than the model's, for a region that keeps everything or nothing, and for sketches that the
    model cannot read.
    """
    task = requests[0].task
    grid = grid_of(generator, task)
    known = is_known = None
    if task.given != "nothing":
        given = [_given(generator, grid, request) for request in requests]
        known = torch.stack([tokens for tokens, _ in given])
        is_known = torch.stack([kept for _, kept in given])
    nothing = generator.text_context([NO_CAPTION] * len(requests))
    return Prepared(
        grid,
        [request.seed for request in requests],
        _context(generator, grid, requests),
        nothing,
        known,
        is_known,
    )


def generate(
    generator: Generator,
    prepared: Prepared,
    settings: SamplingSettings,
    *,
    on_token: Callable[[], object] | None = None,
    on_frame: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Tokens int64 (batch, cells) of prepared requests; see `generate_tokens`."""
    return generate_tokens(
        generator.model,
        prepared.context,
        prepared.without_text,
        prepared.grid,
        prepared.seeds,
        settings,
        known=prepared.known,
        is_known=prepared.is_known,
        on_token=on_token,
        on_frame=on_frame,
    )


def cells_made_new(region: np.ndarray, grid: Grid) -> np.ndarray:
    """bool (cells,) in generation order: the cells that a region touches.

    `region` bool (frames or 1, rows, columns); a single one holds for all frames. Raises
    `UserError` where everything or nothing would be made new.
    """
    cells = np.broadcast_to(touched(region, grid.h, grid.w), (grid.s, grid.h, grid.w)).flatten()
    if not cells.any():
        raise UserError("the region is empty: the mask keeps everything, and nothing is made new")
    if cells.all():
        raise UserError(
            "the region touches every cell: the mask keeps nothing; draw a smaller one, or ask for "
            "a task that is given nothing"
        )
    return cells


def _given(generator: Generator, grid: Grid, request: Request) -> tuple[Tensor, Tensor]:
    """Tokens int64 (cells,) of what is given, and which of them are kept, bool (cells,)."""
    task, pixels = request.task, request.pixels
    if pixels is None:
        raise UserError(f"task {task.name} needs {_an(task.target)} to start from")
    size = generator.picture_size
    if pixels.shape[1:3] != size:
        raise UserError(
            f"the {task.target} is {_size(pixels.shape[1:3])} pixels, and the model's pictures are "
            f"{_size(size)}"
        )
    if task.given == "frames":
        if len(pixels) >= grid.s:
            raise UserError(
                f"{len(pixels)} given frames leave nothing to generate in a clip of {grid.s}"
            )
        cells = np.arange(grid.cells) >= len(pixels) * grid.h * grid.w
    else:
        if len(pixels) != grid.s:
            raise UserError(
                f"the {task.target} has {len(pixels)} frames, and the model changes {grid.s}"
            )
        if request.region is None:
            raise UserError(f"task {task.name} needs a region that is made new")
        if request.region.shape[0] not in (1, grid.s):
            raise UserError(
                f"the mask has {request.region.shape[0]} frames: give one for all, or one for each "
                f"of the {grid.s}"
            )
        cells = cells_made_new(request.region, grid)
    tokens = torch.zeros(grid.cells, dtype=torch.int64, device=generator.device)
    found = generator.encode_frames(pixels)
    tokens[: len(found)] = found
    return tokens, torch.from_numpy(~cells).to(generator.device)


def _context(generator: Generator, grid: Grid, requests: Sequence[Request]) -> Context:
    task = requests[0].task
    if task.reads != "sketch":
        return generator.text_context([request.prompt for request in requests])
    if generator.sketch_vqgan is None:
        raise UserError(
            f"task {task.name} needs a model that was trained on sketches, which this one was not"
        )
    return generator.sketch_context(
        np.stack([_sketch(generator, grid, request) for request in requests])
    )


def _sketch(generator: Generator, grid: Grid, request: Request) -> np.ndarray:
    """The class numbers of all frames, (frames, rows, columns); one map stands for them all."""
    maps, task = request.sketch, request.task
    if maps is None:
        raise UserError(f"task {task.name} needs a sketch")
    if maps.shape[0] not in (1, grid.s):
        raise UserError(
            f"the sketch has {maps.shape[0]} frames: give one for all, or one for each of the "
            f"{grid.s}"
        )
    return np.broadcast_to(maps, (grid.s, *maps.shape[1:]))


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} × {shape[0]}"


def _an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
