"""What a run shows in TensorBoard beside its figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_nuwa.training.monitor import Monitor


def shown_as(run: Path, tag: str) -> list[Any]:
    """The one picture under a tag, over steps and over samples."""
    folders = (run / "tensorboard", run / "tensorboard/by_samples")
    boards = [EventAccumulator(str(folder)).Reload() for folder in folders]
    return [event for board in boards for event in board.Images(tag)]


def test_pictures_stand_over_steps_and_over_samples(tmp_path: Path) -> None:
    pictures = np.full((2, 8, 6, 3), 90, np.uint8)
    with Monitor(tmp_path, enabled=True, samples_a_step=10) as monitor:
        monitor.images("samples/t2i", 7, pictures)
    assert [event.step for event in shown_as(tmp_path, "samples/t2i")] == [7, 70]


def test_clips_move_side_by_side(tmp_path: Path) -> None:
    # A red and a blue clip, each of which grows lighter from frame to frame.
    clips = np.zeros((2, 3, 8, 6, 3), np.uint8)
    for number, channel in enumerate((0, 2)):
        clips[number, :, :, :, channel] = np.array([80, 160, 240])[:, None, None]
    with Monitor(tmp_path, enabled=True, samples_a_step=10) as monitor:
        monitor.video("samples/t2v", 7, clips, 2.5)
    event, by_samples = shown_as(tmp_path, "samples/t2v")
    assert (event.step, event.height, event.width) == (7, 8, 12)
    assert (by_samples.step, by_samples.encoded_image_string) == (70, event.encoded_image_string)
    shown = Image.open(io.BytesIO(event.encoded_image_string))
    assert (shown.format, shown.n_frames, shown.info["loop"]) == ("GIF", 3, 0)
    assert shown.info["duration"] == 400
    for frame in range(3):
        shown.seek(frame)
        pixels = np.asarray(shown.convert("RGB"))
        expected = np.concatenate(list(clips[:, frame]), axis=1)
        assert np.abs(pixels.astype(int) - expected).max() <= 8
