"""A folder of generated pictures: files that say how they were made, a sheet, a list, a gallery."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic

import numpy as np

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sync, write_text_atomically
from megatron_nuwa.generation.drafts import LIST_FILE, SOFTWARE, carry_over, listed_files
from megatron_nuwa.generation.gallery import Gallery
from megatron_nuwa.generation.media import contact_sheet, write_gif, write_mp4, write_png
from megatron_nuwa.generation.reserved import ReservedFolder, reserve_new
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.tasks import Request, Sample
from megatron_nuwa.generation.trained import Generator

PAGE_FILE, SHEET_FILE = "index.html", "sheet.png"
# The gallery holds all samples; writing it anew may take a twentieth of the time.
_PAGE_PAUSES = 19
_SUFFIXES = (".png", ".gif", ".mp4")


def origin_of(
    generator: Generator, request: Request, settings: SamplingSettings
) -> dict[str, object]:
    """What the files of a sample say about themselves."""
    checkpoint = generator.checkpoint
    return {
        "software": SOFTWARE,
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


def check_free(folder: Path, count: int) -> None:
    """`UserError` where samples would take the place of files that no earlier call has written."""
    names = [f"{number:04d}{suffix}" for number in range(count) for suffix in _SUFFIXES]
    written = listed_files(folder)
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


@contextmanager
def sample_writer(
    place: ReservedFolder, asked: int, frames_per_second: float, sketch_classes: int = 0
) -> Iterator[SampleWriter]:
    """A writer of `asked` samples of one task, which keeps what is there whatever happens.

    Samples of an earlier call stay until all of these are there, which are in the folder
    `unfinished` until then. A block that fails leaves whole samples, their list and their gallery,
    and says in one sentence how many there are.
    """
    earlier = listed_files(place.folder) is not None
    with reserve_new(place.folder / "unfinished") if earlier else nullcontext(place) as own:
        writer = SampleWriter(own, asked, frames_per_second, sketch_classes)
        try:
            yield writer
            writer.finish()
        except UserError as error:
            raise UserError("; ".join([str(error), *writer.leave()])) from error
        except BaseException:
            for sentence in writer.leave():
                print(sentence, file=sys.stderr, flush=True)
            raise
        if earlier:
            with _failures_named(place.folder):
                own.become_drafts_of(place)
                carry_over(place.drafts, place.folder)


class SampleWriter:
    """Writes samples of one task as they come; all that lies in the folder is whole at any time.

    samples.json lists what is there after every `add`, and index.html shows it as often as takes no
    more than a small part of the time.
    """

    def __init__(
        self,
        place: ReservedFolder,
        asked: int,
        frames_per_second: float,
        sketch_classes: int = 0,
    ) -> None:
        self._place, self._asked, self._frames_per_second = place, asked, frames_per_second
        self._gallery = Gallery(frames_per_second, sketch_classes)
        self._entries: list[dict[str, object]] = []
        self._samples: list[Sample] = []
        self._bytes = 0
        self._page_ended = self._page_seconds = 0.0

    def add(self, samples: Sequence[Sample]) -> None:
        """Write the files of samples, then list them; `UserError` where that does not succeed."""
        folder, drafts = self._place.folder, self._place.drafts
        new: list[dict[str, object]] = []
        size = 0
        with _failures_named(folder, self._needed):
            for number, sample in enumerate(samples, start=len(self._entries)):
                stem = drafts / f"{number:04d}"
                files = write_media(stem, sample.frames, self._frames_per_second, sample.origin)
                new.append({**sample.origin, "files": [path.name for path in files]})
                size += sum(path.stat().st_size for path in files)
            content = json.dumps([*self._entries, *new], indent=2)
            write_text_atomically(drafts / LIST_FILE, content)
            # From here on they count, for a failure on the way is made good by `leave`.
            self._entries += new
            self._samples += samples
            self._bytes += size
            for sample, entry in zip(samples, new, strict=True):
                self._gallery.add(sample, entry)
            carry_over(drafts, folder)
            if monotonic() - self._page_ended >= _PAGE_PAUSES * self._page_seconds:
                self._write_page()

    def finish(self) -> None:
        """Write the gallery and the sheet of all samples."""
        with _failures_named(self._place.folder, self._needed):
            self._write_page()
            sheet = contact_sheet(np.stack([sample.frames for sample in self._samples]))
            draft = self._place.drafts / SHEET_FILE
            write_png(draft, sheet, {"task": self._samples[0].request.task.name})
            os.replace(draft, self._place.folder / SHEET_FILE)

    def leave(self) -> list[str]:
        """Put in order what a failed call leaves, and say it in a sentence; none for nothing."""
        folder, drafts = self._place.folder, self._place.drafts
        # What made the call fail, such as a full disk, may make this fail as well.
        with suppress(OSError):
            carry_over(drafts, folder)
            for path in drafts.iterdir():
                path.unlink()
        if not self._entries:
            return []
        with suppress(OSError):
            self._write_page()
        noun = f"{self._samples[0].request.task.target}{'' if self._asked == 1 else 's'}"
        return [f"{len(self._entries)} of {self._asked} {noun} are there, whole, in {folder}"]

    def _write_page(self) -> None:
        began = monotonic()
        draft = self._place.drafts / PAGE_FILE
        draft.write_text(self._gallery.page(self._asked), encoding="utf-8")
        sync(draft)
        os.replace(draft, self._place.folder / PAGE_FILE)
        self._page_ended = monotonic()
        self._page_seconds = self._page_ended - began

    def _needed(self) -> str:
        """How much the missing samples will take, from what the others take."""
        missing = self._asked - len(self._entries)
        if not (missing and self._entries):
            return ""
        needed = self._bytes / len(self._entries) * missing / 1e6
        return f": the {missing} samples that are missing take about {needed:,.2f} MB"


@contextmanager
def _failures_named(folder: Path, needed: Callable[[], str] = str) -> Iterator[None]:
    """Have a failure of the file system be a `UserError` that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space is left for {folder}{needed()}") from error
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
