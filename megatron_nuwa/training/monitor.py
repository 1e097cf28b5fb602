"""What a run tells: TensorBoard, `log.jsonl` and one console line a step."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from megatron_nuwa.files import write_text_atomically


class Monitor:
    """Writes a run's figures; does nothing on processes other than the first.

    Everything is written twice to TensorBoard: over steps in `tensorboard/`, and over samples seen
    in `tensorboard/by_samples/`, so that runs of different batch sizes can be compared.
    `log.jsonl` holds one object a line: step, samples, seconds since the run began, and the tags.

    A run that continues after `step` steps forgets what it has told of later ones, which come
    again.
    """

    def __init__(self, run: Path, *, enabled: bool, samples_a_step: int, step: int = 0) -> None:
        self._enabled = enabled
        self._run = run
        # The last step that TensorBoard has been told of.
        self._told = step
        self._samples_a_step = samples_a_step
        self._start = time.monotonic()
        self._by_step: SummaryWriter | None = None
        self._by_samples: SummaryWriter | None = None
        self._fails = False
        if not enabled:
            return
        run.mkdir(parents=True, exist_ok=True)
        log_path = run / "log.jsonl"
        self._seconds_before = _forget_later(log_path, step)
        self._log = log_path.open("a", encoding="utf-8")
        self._attempt(self._open)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write figures under their tags, such as `train/loss`."""
        if not self._enabled:
            return
        seconds = round(self._seconds_before + time.monotonic() - self._start, 3)
        line = {"step": step, "samples": self._samples(step), "seconds": seconds, **values}

        def write() -> None:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
            for board, place in self._boards(step):
                for tag, value in values.items():
                    board.add_scalar(tag, value, place)

        self._attempt(write)

    def images(self, tag: str, step: int, images: np.ndarray) -> None:
        """Show pictures; `images` is uint8 (count, rows, columns, 3)."""

        def write() -> None:
            for board, place in self._boards(step):
                board.add_images(tag, images, place, dataformats="NHWC")

        if self._enabled:
            self._attempt(write)

    def video(self, tag: str, step: int, clips: np.ndarray, frames_per_second: float) -> None:
        """Show clips that move, side by side; `clips` is uint8 (count, frames, rows, columns, 3).

        PyTorch's own `add_video` makes the same of them, an endless GIF, with an encoder that
        nothing else here needs.
        """

        def write() -> None:
            summary = _animation(tag, np.concatenate(list(clips), axis=2), frames_per_second)
            for board, place in self._boards(step):
                board._get_file_writer().add_summary(summary, place)

        if self._enabled:
            self._attempt(write)

    def close(self) -> None:
        """Flush and close every file."""
        if self._enabled:
            self._attempt(self._log.close)
            self._attempt(self._close_boards)

    def _samples(self, step: int) -> int:
        return step * self._samples_a_step

    def _boards(self, step: int) -> list[tuple[SummaryWriter, int]]:
        """The boards, each with the place of a step on its axis."""
        by_step, by_samples = self._open()
        self._told = step
        return [(by_step, step), (by_samples, self._samples(step))]

    def _open(self) -> tuple[SummaryWriter, SummaryWriter]:
        if self._by_step is None or self._by_samples is None:
            folder = self._run / "tensorboard"
            self._by_step = SummaryWriter(str(folder), purge_step=self._told + 1)
            self._by_samples = SummaryWriter(
                str(folder / "by_samples"), purge_step=self._samples(self._told) + 1
            )
        return self._by_step, self._by_samples

    def _close_boards(self) -> None:
        boards = (self._by_step, self._by_samples)
        self._by_step = self._by_samples = None
        for board in boards:
            if board is not None:
                board.close()

    def _attempt(self, write: Callable[[], object]) -> None:
        """A full disk costs figures, not the run; it is told once."""
        try:
            write()
        except OSError as error:
            if not self._fails:
                print(f"warning: {self._run}: figures are lost ({error})", flush=True)
            self._fails = True
            # A writer that failed once fails for ever.
            with suppress(OSError):
                self._close_boards()
        else:
            self._fails = False


def _animation(tag: str, frames: np.ndarray, frames_per_second: float) -> Summary:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    content = io.BytesIO()
    duration = round(1000 / frames_per_second)
    first.save(content, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    image = Summary.Image(
        height=first.height,
        width=first.width,
        colorspace=3,
        encoded_image_string=content.getvalue(),
    )
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _forget_later(log_path: Path, step: int) -> float:
    """Leave out the log's lines after `step` and what a killed process has not ended.

    Returns the seconds that the run had lasted then, 0 for a new run.
    """
    if not log_path.exists():
        return 0.0
    text = log_path.read_text(encoding="utf-8", errors="replace")
    kept: list[str] = []
    seconds = 0.0
    for line in text.splitlines(keepends=True):
        with suppress(ValueError):
            values = json.loads(line)
            if line.endswith("\n") and values.get("step", 0) <= step:
                kept.append(line)
                seconds = float(values.get("seconds", 0.0))
    if (remaining := "".join(kept)) != text:
        write_text_atomically(log_path, remaining)
    return seconds
