"""Frames as they are generated: the sampler in a thread of its own, and what it has so far."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import TypeAlias

import numpy as np
from torch import Tensor

from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.tasks import Request, generate, prepare
from megatron_nuwa.generation.trained import Generator

# How often the number of cells is told.
_SECONDS = 0.25


@dataclass(frozen=True)
class Progress:
    """What there is so far: `frames` uint8 (samples, frames, rows, columns, 3), cells of all."""

    frames: np.ndarray
    wanted_frames: int
    cells: int
    wanted_cells: int


# A frame's tokens, the number of cells so far, what went wrong, or the end.
_Event: TypeAlias = Tensor | int | BaseException | None


class _StoppedError(Exception):
    """Nobody waits for the rest."""


def stream(
    generator: Generator,
    requests: Sequence[Request],
    settings: SamplingSettings,
    frames: int | None = None,
) -> Iterator[Progress]:
    """Progress at every frame and a few times a second, the last with all frames.

    Where it is taken more slowly than that, each is the newest there is.

    `frames` is the length of a video. Closing the iterator ends the sampling. Raises `UserError`
    as `prepare` does.
    """
    prepared = prepare(generator, requests, frames)
    grid = prepared.grid
    told: SimpleQueue[_Event] = SimpleQueue()
    stopped = Event()
    done, last = 0, 0.0

    def on_token() -> None:
        nonlocal done, last
        if stopped.is_set():
            raise _StoppedError
        done += 1
        if time.monotonic() - last >= _SECONDS:
            last = time.monotonic()
            told.put(done)

    def on_frame(_: int, tokens: Tensor) -> None:
        told.put(tokens.clone())

    def work() -> None:
        try:
            generate(generator, prepared, settings, on_token=on_token, on_frame=on_frame)
            told.put(None)
        except BaseException as error:
            told.put(error)

    rows, columns = generator.picture_size
    shown = np.zeros((len(requests), 0, rows, columns, 3), np.uint8)
    cells = 0
    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        is_done = False
        while not is_done:
            for event in _waited_for(told):
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    is_done = True
                elif isinstance(event, int):
                    cells = event
                else:
                    arrived = generator.pixels(event, grid._replace(s=1))
                    shown = np.concatenate([shown, arrived], axis=1)
                    cells = max(cells, shown.shape[1] * grid.h * grid.w)
            yield Progress(shown, grid.s, cells, grid.cells)
    finally:
        stopped.set()
        thread.join()


def _waited_for(told: SimpleQueue[_Event]) -> Iterator[_Event]:
    """All that has been told by now, at least one event; what is told meanwhile comes next time.

    Whoever shows progress more slowly than it is made would otherwise show the past.
    """
    first = told.get()
    more = told.qsize()
    yield first
    for _ in range(more):
        yield told.get()
