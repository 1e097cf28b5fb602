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
from megatron_nuwa.generation.longer import generate_long, window_starts
from megatron_nuwa.generation.regions import check_frames, touched
from megatron_nuwa.generation.sampling import NonFiniteLogitsError, SamplingSettings
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
    """Requests of one task, as the sampler takes them; cells where `is_known` is True are kept.

    `grid` is of the whole picture, `window` the model's own; a longer video is made by a window
    that slides on with `overlap` frames of what it has made. There is a context for each window.
    """

    grid: Grid
    window: Grid
    overlap: int
    seeds: list[int]
    contexts: list[Context]
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
    return generator.grids[task.name]


def prepare(
    generator: Generator,
    requests: Sequence[Request],
    frames: int | None = None,
    overlap: int | None = None,
) -> Prepared:
    """What the sampler needs for requests of the same task.

    `frames` is the length of a video, the model's own unless it is given; `overlap` how many frames
    a sliding window takes along, half of the model's unless it is given. Raises `UserError` for a
    prompt that is empty or too long, for media of another size or length than asked for, for a
    region that keeps everything or nothing, and for sketches that the model cannot read.
    """
    task = requests[0].task
    generator = generator.for_task(task.name)
    window = grid_of(generator, task)
    grid, starts, overlap = _whole(task, window, frames, overlap)
    known = is_known = None
    if task.given != "nothing":
        given = [_given(generator, grid, request) for request in requests]
        known = torch.stack([tokens for tokens, _ in given])
        is_known = torch.stack([kept for _, kept in given])
    return Prepared(
        grid,
        window,
        overlap,
        [request.seed for request in requests],
        _contexts(generator, grid, window, starts, requests),
        generator.text_context([NO_CAPTION] * len(requests)),
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
    """Tokens int64 (batch, cells) of prepared requests; see `generate_long`.

    Raises `UserError` that names the checkpoint where its logits are NaN or infinite.
    """
    try:
        return generate_long(
            generator.model,
            prepared.contexts,
            prepared.without_text,
            prepared.window,
            prepared.seeds,
            settings,
            frames=prepared.grid.s,
            overlap=prepared.overlap,
            known=prepared.known,
            is_known=prepared.is_known,
            on_token=on_token,
            on_frame=on_frame,
        )
    except NonFiniteLogitsError as error:
        if generator.checkpoint is None:
            raise
        raise UserError(
            f"{generator.checkpoint.path} cannot be sampled from: {error}; name an earlier one"
        ) from error


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
                f"the {task.target} has {len(pixels)} frames, and {grid.s} are to be changed"
            )
        if request.region is None:
            raise UserError(f"task {task.name} needs a region that is made new")
        check_frames(request.region, grid.s)
        cells = cells_made_new(request.region, grid)
    tokens = torch.zeros(grid.cells, dtype=torch.int64, device=generator.device)
    found = generator.encode_frames(pixels)
    tokens[: len(found)] = found
    return tokens, torch.from_numpy(~cells).to(generator.device)


def _whole(
    task: Task, window: Grid, frames: int | None, overlap: int | None
) -> tuple[Grid, list[int], int]:
    """The grid of a whole video, the first frame of each window of it, and their overlap."""
    frames = window.s if frames is None else frames
    if frames != window.s and task.target == "image":
        raise UserError(f"task {task.name} writes images, which have no number of frames")
    fewest = 2 if task.given == "frames" else 1
    if window.s == 1 < max(frames, fewest):
        raise UserError(f"task {task.name} makes clips, and the model makes single frames only")
    if frames < fewest:
        raise UserError(f"{frames} frames are too few for task {task.name}")
    overlap = max(1, window.s // 2) if overlap is None else overlap
    try:
        return window._replace(s=frames), window_starts(frames, window, overlap), overlap
    except ValueError as error:
        raise UserError(str(error)) from error


def _contexts(
    generator: Generator,
    grid: Grid,
    window: Grid,
    starts: Sequence[int],
    requests: Sequence[Request],
) -> list[Context]:
    """What the encoder reads for each window."""
    task = requests[0].task
    if task.reads != "sketch":
        return [generator.text_context([request.prompt for request in requests])] * len(starts)
    if generator.sketch_vqgan is None:
        raise UserError(
            f"task {task.name} needs a model that was trained on sketches, which this one was not"
        )
    maps = np.stack([_sketch(grid, request) for request in requests])
    # The last window may reach beyond the video's end.
    missing = max(0, starts[-1] + window.s - grid.s)
    maps = np.concatenate([maps, maps[:, -1:].repeat(missing, axis=1)], axis=1)
    return [generator.sketch_context(maps[:, start : start + window.s]) for start in starts]


def _sketch(grid: Grid, request: Request) -> np.ndarray:
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
