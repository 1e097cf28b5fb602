"""One decoding step as a CUDA graph, captured once and replayed for every cell."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_nuwa.generation.decoding import CachedDecoder

# Libraries choose their algorithms and make their workspaces in the first calls.
_WARM_UPS = 3


class StepGraph:
    """A step of a static decoder: all that changes from cell to cell lies on the device."""

    def __init__(self, decoder: CachedDecoder, step: Callable[[], None]) -> None:
        self._decoder, self._step = decoder, step
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        """Decode the next cell."""
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()
        self._decoder.went_on()

    def _captured(self) -> torch.cuda.CUDAGraph:
        decoder = self._decoder
        cell = decoder.position
        stream = torch.cuda.Stream(decoder.device)
        stream.wait_stream(torch.cuda.current_stream(decoder.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step()
                # The same cell again: others' slots may hold what is still looked at.
                decoder.position = cell
        torch.cuda.current_stream(decoder.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a page's, may use the device meanwhile. A stream of its own: graphs
        # that share one share the workspace of its products, too, which the end of one frees.
        with (
            _no_collection(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self._step()
        # Capturing runs nothing on the device, but the host has counted.
        decoder.position = cell
        return graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: the end of another graph would spoil a capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
