"""A page that shows generated pictures beside what they were made from; one file, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def gallery_page(
    samples: Sequence[Sample],
    entries: Sequence[Mapping[str, object]],
    frames_per_second: float,
    sketch_classes: int = 0,
) -> str:
    """The page's HTML for samples of one task; `entries` are their lines of samples.json."""
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for sample, entry in zip(samples, entries, strict=True):
        key = (sample.request.prompt, entry.get("given"), entry.get("sketch"))
        if key not in groups:
            groups[key] = _group(sample.request, entry, frames_per_second, sketch_classes)
        groups[key]["results"].append(
            {
                "source": address(sample.frames, frames_per_second),
                "seed": sample.request.seed,
                "score": entry.get("clip_score"),
                "files": entry["files"],
            }
        )
    origin = entries[0]
    shown = {name: origin.get(key) for key, name in _SETTINGS.items()}
    return render_page(
        Path(__file__).with_name("gallery.html.j2"),
        task=samples[0].request.task,
        groups=list(groups.values()),
        count=len(samples),
        frames=len(samples[0].frames),
        frames_per_second=frames_per_second,
        side=samples[0].frames.shape[2],
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
