"""A page that shows generated pictures beside what they were made from; one file, no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nuwa.generation.media import address
from megatron_nuwa.generation.palette import coloured
from megatron_nuwa.generation.regions import outline
from megatron_nuwa.generation.tasks import Request, Sample
from megatron_nuwa.pages import render_page

# Given pictures are shown at least this large, so that a region's outline is a fine line.
_SHOWN_SIDE = 320
_OUTLINE = (255, 45, 120)
_SETTINGS = {
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "guidance": "guidance",
    "frames": "frames",
    "overlap": "overlap",
    "best_of": "best of",
    "clip": "ranked by",
    "keep_frames": "frames kept",
    "keep_pixels": "kept pixels put back",
}
_LABELS = {"region": "Given, to be made new inside the line", "frames": "Given"}


class Gallery:
    """The page of samples of one task, which may come one after another."""

    def __init__(self, frames_per_second: float, sketch_classes: int = 0) -> None:
        self._frames_per_second, self._sketch_classes = frames_per_second, sketch_classes
        self._groups: dict[tuple[object, ...], dict[str, Any]] = {}
        self._first: tuple[Sample, Mapping[str, object]] | None = None
        self._count = 0

    def add(self, sample: Sample, entry: Mapping[str, object]) -> None:
        """Take a sample in; `entry` is its line of samples.json."""
        key = (sample.request.prompt, entry.get("given"), entry.get("sketch"))
        if key not in self._groups:
            self._groups[key] = _group(
                sample.request, entry, self._frames_per_second, self._sketch_classes
            )
        self._groups[key]["results"].append(
            {
                "source": address(sample.frames, self._frames_per_second),
                "seed": sample.request.seed,
                "score": entry.get("clip_score"),
                "files": entry["files"],
            }
        )
        self._first = self._first or (sample, entry)
        self._count += 1

    def page(self, asked: int) -> str:
        """The page's HTML for the samples so far, of `asked` that there are to be."""
        assert self._first is not None
        sample, origin = self._first
        shown = {name: origin.get(key) for key, name in _SETTINGS.items()}
        return render_page(
            Path(__file__).with_name("gallery.html.j2"),
            task=sample.request.task,
            groups=list(self._groups.values()),
            count=self._count,
            asked=asked,
            frames=len(sample.frames),
            frames_per_second=self._frames_per_second,
            side=sample.frames.shape[2],
            checkpoint=origin.get("checkpoint"),
            step=origin.get("step"),
            sha256=origin.get("sha256"),
            settings={name: value for name, value in shown.items() if value not in (None, False)},
        )


def shown_given(request: Request, sketch_classes: int = 0) -> np.ndarray | None:
    """What a request starts from, as one looks at it: uint8 (frames, rows, columns, 3) or None.

    A region is outlined in what is given, a sketch is in colours, and small pictures are enlarged.
    """
    if request.sketch is not None:
        return _enlarged(coloured(request.sketch, sketch_classes))
    if request.pixels is None:
        return None
    frames = _enlarged(request.pixels)
    if request.region is None:
        return frames
    line = outline(_enlarged(request.region))
    inner = outline(_enlarged(request.region) & ~line)
    return np.where((line | inner)[..., None], np.array(_OUTLINE, np.uint8), frames)


def _group(
    request: Request,
    entry: Mapping[str, object],
    frames_per_second: float,
    sketch_classes: int,
) -> dict[str, Any]:
    given = shown_given(request, sketch_classes)
    label = "Sketch" if request.sketch is not None else _LABELS.get(request.task.given, "")
    named = entry.get("sketch") or entry.get("given")
    return {
        "prompt": request.prompt if request.task.reads == "text" else None,
        "given": None if given is None else address(given, frames_per_second, lossless=True),
        "label": label,
        "file": None if named is None else Path(str(named)).name,
        "path": named,
        "results": [],
    }


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """(frames, rows, columns, …), each pixel repeated until the picture is large enough."""
    times = max(1, -(-_SHOWN_SIDE // pixels.shape[1]))
    return pixels.repeat(times, axis=1).repeat(times, axis=2)
