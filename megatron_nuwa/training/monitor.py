"""What a run tells: TensorBoard, `log.jsonl` and one console line a step."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Writes a run's figures; does nothing on processes other than the first.

    Every scalar is written twice to TensorBoard: over steps in `tensorboard/`, and over samples
    seen in `tensorboard/by_samples/`, so that runs of different batch sizes can be compared.
    `log.jsonl` holds one object a line: step, samples, seconds since the run began, and the tags.
    """

    def __init__(self, run: Path, *, enabled: bool) -> None:
        self._enabled = enabled
        self._start = time.monotonic()
        if not enabled:
            return
        run.mkdir(parents=True, exist_ok=True)
        self._by_step = SummaryWriter(str(run / "tensorboard"))
        self._by_samples = SummaryWriter(str(run / "tensorboard" / "by_samples"))
        log_path = run / "log.jsonl"
        self._seconds_before = _last_seconds(log_path)
        self._log = log_path.open("a", encoding="utf-8")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Write figures under their tags, such as `train/loss`."""
        if not self._enabled:
            return
        for tag, value in values.items():
            self._by_step.add_scalar(tag, value, step)
            self._by_samples.add_scalar(tag, value, samples)
        seconds = round(self._seconds_before + time.monotonic() - self._start, 3)
        line = {"step": step, "samples": samples, "seconds": seconds, **values}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    def images(self, tag: str, step: int, images: np.ndarray) -> None:
        """Show pictures; `images` is uint8 (count, rows, columns, 3)."""
        if self._enabled:
            self._by_step.add_images(tag, images, step, dataformats="NHWC")

    def video(self, tag: str, step: int, clips: np.ndarray, frames_per_second: float) -> None:
        """Show clips as a strip of frames; `clips` is uint8 (count, frames, rows, columns, 3).

        TensorBoard's own video summary needs an unmaintained encoder, so every clip becomes one
        row of frames.
        """
        if self._enabled:
            strip = np.concatenate([np.concatenate(list(clip), axis=1) for clip in clips], axis=0)
            self._by_step.add_image(tag, strip, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close every file."""
        if self._enabled:
            self._by_step.close()
            self._by_samples.close()
            self._log.close()


def _last_seconds(log_path: Path) -> float:
    """Seconds that the run had lasted when its log was last written; 0 for a new run."""
    if not log_path.exists():
        return 0.0
    lines = [line for line in log_path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return float(json.loads(lines[-1]).get("seconds", 0.0)) if lines else 0.0
