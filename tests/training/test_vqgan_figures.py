"""Figures of a VQ-GAN's training: speed is that of the steps, and counts are counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import lone_process

from megatron_nuwa.training import vqgan_figures, vqgan_trainer
from megatron_nuwa.training.frames import Batch
from megatron_nuwa.training.vqgan_figures import FigureWindow
from megatron_nuwa.training.vqgan_recipe import VqganRecipe
from megatron_nuwa.training.vqgan_trainer import VqganTraining

CODES = 4


def test_speed_is_that_of_the_steps_whatever_comes_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second, a batch another quarter, and all else a hundred seconds."""
    now, speeds = 0.0, []

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    def loaded(*arguments: Any) -> Iterator[Batch]:
        take(100)
        for _ in range(*arguments[-2:]):
            yield Batch(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 0)
            take(0.25)

    class Step:
        recipe = VqganRecipe(
            run=tmp_path,
            model={"image_size": 8, "downsampling": 8, "codebook_size": CODES},
            data={"train": ["t.jsonl"], "held_out": ["h.jsonl"]},
            loss={"perceptual_weight": 0},
            codebook={"start_step": 2},
            steps=4,
            batch_size=2,
            log_every=1,
            checkpoint_every=1,
            evaluate_every=1,
        )
        processes = lone_process()

        def start_codebook(self, step: int, frames: object) -> None:
            take(100)

        def __call__(self, step: int, images: object) -> Any:
            take(1)
            return {"train/loss": torch.zeros(())}, torch.ones(CODES)

    monkeypatch.setattr(vqgan_figures, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(vqgan_trainer, "training_batches", loaded)
    monkeypatch.setattr(vqgan_trainer, "kmeans_batches", lambda *_: loaded(0, 1))
    monkeypatch.setattr(vqgan_trainer, "_save", lambda *_, must: take(100))
    monkeypatch.setattr(VqganTraining, "_evaluate", lambda *_: take(100))
    monitor: Any = SimpleNamespace(
        scalars=lambda step, values: speeds.append(values["speed/images_per_second"])
    )
    stop: Any = SimpleNamespace(received=0)
    watchdog: Any = SimpleNamespace(beat=lambda: None)
    step: Any = Step()
    training = VqganTraining(step, 0, 0, [], [1], monitor, stop, watchdog)  # type: ignore[arg-type]
    take(100)
    training._train()
    # The first batch of each of two loaders is there when the clock starts.
    assert speeds == [2 / 1, 2 / 1.25, 2 / 1, 2 / 1.25]


def test_counts_are_not_averaged_over_steps() -> None:
    window = FigureWindow(CODES, lone_process())
    for skipped, moved, loss in ((3, 5, 1.0), (4, 0, 2.0), (4, 7, 6.0)):
        figures = {
            "train/skipped_steps": float(skipped),
            "codebook/restarted": float(moved),
            "train/loss": loss,
        }
        tensors = {tag: torch.tensor(value) for tag, value in figures.items()}
        window.add(tensors, torch.ones(CODES), broken=1)
    values = window.close(batch_size=2)
    assert values["train/skipped_steps"] == 4
    assert values["codebook/restarted"] == 12
    assert values["train/loss"] == 3
    assert values["data/broken_items"] == 3
