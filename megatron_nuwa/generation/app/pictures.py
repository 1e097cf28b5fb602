"""Pictures as the page shows them: those that arrive, and finished ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_nuwa.generation.app.stream import Progress
from megatron_nuwa.generation.media import address
from megatron_nuwa.generation.tasks import Request


class Arriving:
    """The frames of some requests as they arrive, each of which is made into a picture once."""

    def __init__(self, requests: Sequence[Request], frames_per_second: float) -> None:
        self._requests, self._frames_per_second = requests, frames_per_second
        self._pictures: list[list[str]] = [[] for _ in requests]
        self._is_empty = True

    def show(self, progress: Progress) -> str | None:
        """The newest frame of each sample, above all that are there and places for the rest.

        None where nothing has arrived since the last call.
        """
        count = progress.frames.shape[1]
        if not self._is_empty and count == len(self._pictures[0]):
            return None
        self._is_empty = False
        for pictures, frames in zip(self._pictures, progress.frames, strict=True):
            for frame in frames[len(pictures) :]:
                pictures.append(address(frame[None], self._frames_per_second))
        wanted = progress.wanted_frames
        figures = [
            _figure(_newest(pictures) + _strip(pictures, wanted), request)
            for request, pictures in zip(self._requests, self._pictures, strict=True)
        ]
        return f'<div class="pictures">{"".join(figures)}</div>'


def finished_pictures(
    requests: Sequence[Request], clips: np.ndarray, frames_per_second: float
) -> str:
    """The finished images or clips, uint8 (samples, frames, rows, columns, 3)."""
    figures = [
        _figure(f'<img src="{address(clip, frames_per_second)}" alt="generated">', request)
        for request, clip in zip(requests, clips, strict=True)
    ]
    return f'<div class="pictures finished">{"".join(figures)}</div>'


def _newest(pictures: list[str]) -> str:
    return f'<img src="{pictures[-1]}" alt="newest frame">' if pictures else ""


def _strip(pictures: list[str], wanted: int) -> str:
    if wanted == 1:
        return ""
    waiting = "<span></span>" * (wanted - len(pictures))
    there = "".join(f'<img src="{each}" alt="frame">' for each in pictures)
    return f'<div class="strip">{there}{waiting}</div>'


def _figure(content: str, request: Request) -> str:
    return f"<figure>{content}<figcaption>seed {request.seed}</figcaption></figure>"
