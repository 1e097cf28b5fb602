"""A folder of generated pictures: files that say how they were made, a sheet, a list, a gallery."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.gallery import gallery_page
from megatron_nuwa.generation.media import contact_sheet, write_gif, write_mp4, write_png
from megatron_nuwa.generation.reserved import ReservedFolder
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.tasks import Request, Sample
from megatron_nuwa.generation.trained import Generator

LIST_FILE, PAGE_FILE, SHEET_FILE = "samples.json", "index.html", "sheet.png"
_SUFFIXES = {"image": (".png",), "clip": (".gif", ".mp4")}


def origin_of(
    generator: Generator, request: Request, settings: SamplingSettings
) -> dict[str, object]:
    """What the files of a sample say about themselves."""
    checkpoint = generator.checkpoint
    return {
        "software": "megatron_nuwa",
        "task": request.task.name,
        "prompt": request.prompt,
        "seed": request.seed,
        **asdict(settings),
        "checkpoint": None if checkpoint is None else str(checkpoint.path),
        "step": None if checkpoint is None else checkpoint.step,
        "sha256": None if checkpoint is None else checkpoint.sha256,
    }


def write_media(
    stem: Path, frames: np.ndarray, frames_per_second: float, origin: Mapping[str, object]
) -> list[Path]:
    """Write a PNG of an image, a GIF and an MP4 of a clip; `stem` is their name without ending."""
    if len(frames) == 1:
        write_png(stem.with_suffix(".png"), frames[0], origin)
        return [stem.with_suffix(".png")]
    write_gif(stem.with_suffix(".gif"), frames, frames_per_second, origin)
    write_mp4(stem.with_suffix(".mp4"), frames, frames_per_second, origin)
    return [stem.with_suffix(".gif"), stem.with_suffix(".mp4")]


def write_samples(
    place: ReservedFolder,
    samples: Sequence[Sample],
    frames_per_second: float,
    sketch_classes: int = 0,
) -> None:
    """Write every sample, sheet.png, samples.json and index.html, aside first, then all at once.

    Samples are of one task. They take the place of an earlier call's; other files stay. Raises
    `UserError` naming the folder where it cannot be written.
    """
    output, drafts = place.folder, place.drafts
    try:
        entries = []
        for number, sample in enumerate(samples):
            stem = drafts / f"{number:04d}"
            files = write_media(stem, sample.frames, frames_per_second, sample.origin)
            entries.append({**sample.origin, "files": [path.name for path in files]})
        task = samples[0].request.task
        sheet = contact_sheet(np.stack([sample.frames for sample in samples]))
        write_png(drafts / SHEET_FILE, sheet, {"task": task.name})
        (drafts / LIST_FILE).write_text(json.dumps(entries, indent=2), encoding="utf-8")
        page = gallery_page(samples, entries, frames_per_second, sketch_classes)
        (drafts / PAGE_FILE).write_text(page, encoding="utf-8")
        for name in _written(output) or ():
            (output / name).unlink(missing_ok=True)
        for path in drafts.iterdir():
            os.replace(path, output / path.name)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error


def check_free(folder: Path, count: int, target: Literal["image", "clip"]) -> None:
    """`UserError` where samples would take the place of files that no earlier call has written."""
    suffixes = _SUFFIXES[target]
    names = [f"{number:04d}{suffix}" for number in range(count) for suffix in suffixes]
    written = _written(folder)
    if written is not None:
        written |= {SHEET_FILE, PAGE_FILE, LIST_FILE}
    others = [
        name
        for name in (*names, SHEET_FILE, PAGE_FILE, LIST_FILE)
        if os.path.lexists(folder / name) and name not in (written or ())
    ]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"--output {folder} holds {others[0]}{more}, which no earlier call has written: name "
            "another folder"
        )


def _written(folder: Path) -> set[str] | None:
    """Names of the samples that an earlier call has left in a folder; None where there was none."""
    try:
        entries = json.loads((folder / LIST_FILE).read_text(encoding="utf-8"))
        # Names, not paths: nothing outside the folder is meant.
        return {Path(str(name)).name for entry in entries for name in entry["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return None
