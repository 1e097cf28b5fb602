"""Frames from worker processes, and what a VQ-GAN makes of the held-out ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import lone_process
from torch import Tensor
from torch.utils.data import Dataset

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig
from megatron_nuwa.training import frames as frames_room
from megatron_nuwa.training import vqgan_evaluation as evaluation_room
from megatron_nuwa.training.frames import (
    Draw,
    Sample,
    load,
)
from megatron_nuwa.training.stopping import outlive_stop_signals
from megatron_nuwa.training.vqgan_evaluation import evaluate_vqgan


class Signed(Dataset[Sample]):
    """Frames that tell who loaded them; those from `end` on cannot be."""

    def __init__(self, folder: Path, end: int = 10) -> None:
        self._folder, self._end = folder, end

    def __len__(self) -> int:
        return 10

    def __getitem__(self, draw: Draw) -> Sample:
        (self._folder / str(os.getpid())).touch()
        if draw.place >= self._end:
            raise UserError("20 items in a row cannot be decoded")
        rng = np.random.default_rng(draw.place)
        return Sample(rng.integers(0, 256, (10, 10, 3), np.uint8), int(draw.place in (3, 7)))


def test_held_out_frames_are_loaded_by_workers_and_judged_the_same(tmp_path: Path) -> None:
    lone_process()
    model, found = small_vqgan(), []
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        folder.mkdir()
        cpu = torch.device("cpu")
        found.append(evaluate_vqgan(model, Signed(folder), 4, cpu, workers))
        loaded_here = [path.name == str(os.getpid()) for path in folder.iterdir()]
        assert loaded_here == [workers == 0]
    assert found[0] == found[1]
    assert (found[0].frames, found[0].broken) == (10, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_loaded_is_one_sentence_from_a_worker_too(
    tmp_path: Path, workers: int
) -> None:
    draws = [[Draw(0, 0), Draw(1, 0)], [Draw(1, 0), Draw(2, 0)]]
    found = load(Signed(tmp_path, end=2), draws, workers)
    assert next(found).frames.shape == (2, 10, 10, 3)
    with pytest.raises(UserError, match=r"^20 items in a row cannot be decoded$"):
        next(found)


def small_vqgan() -> Vqgan:
    torch.manual_seed(0)
    config = VqganConfig(image_size=8, downsampling=4, base_channels=8, codebook_size=16)
    return Vqgan(config).eval()


def test_processes_share_the_held_out_frames_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes its own, and what they add up to is what one finds alone."""
    model, dataset, cpu = small_vqgan(), Signed(tmp_path), torch.device("cpu")

    def sums(rank: int, world_size: int) -> tuple[list[Tensor], int]:
        """What a process brings to the sums, and how often it says that it goes on."""
        sent: list[Tensor] = []
        heard: list[None] = []
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
        monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.clone()))
        found = evaluate_vqgan(model, dataset, 2, cpu, 0, lambda: heard.append(None))
        assert found.frames == 10
        return sent, len(heard)

    alone, beats = sums(0, 1)
    # Qualities, how often each code occurs, and broken items.
    assert [sent.numel() for sent in alone] == [2, 16, 1]
    # Before each of five batches, and before the first is waited for.
    assert beats == 6
    three = [sums(rank, 3) for rank in range(3)]
    assert [beats for _, beats in three] == [3, 3, 3]
    for number, expected in enumerate(alone):
        total = sum(sent[number] for sent, _ in three)
        # Convolutions of another batch add up in another order.
        torch.testing.assert_close(total, expected, rtol=1e-3, atol=0)
    assert int(alone[2]) == 2


def test_a_mean_is_over_the_frames_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset, cpu = small_vqgan(), Signed(tmp_path), torch.device("cpu")
    lone_process()
    expected = evaluate_vqgan(model, dataset, 4, cpu, 0)
    assert expected.quality["psnr_db"] < 30
    assert 0 < expected.used_fraction < 1
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    # The other one has found as much in the other half.
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    found = evaluate_vqgan(model, dataset, 4, cpu, 0)
    for name, value in expected.quality.items():
        assert found.quality[name] == pytest.approx(value, rel=0.2)


def test_what_is_judged_is_the_middle_of_a_frame() -> None:
    frame = np.zeros((10, 10, 3), np.uint8)
    frame[1:9, 1:9] = 255
    images = evaluation_room._centres(
        small_vqgan(), torch.from_numpy(frame)[None], torch.device("cpu")
    )
    assert images.shape == (1, 3, 8, 8)
    there = evaluation_room._centres(
        small_vqgan(), torch.from_numpy(frame)[None], torch.device("meta")
    )
    assert there.device.type == "meta"
    assert images.eq(1).all()


def test_a_batch_counts_all_that_its_frames_passed_over() -> None:
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    samples = [Sample(frame, broken) for frame, broken in zip(frames, (2, 0, 5), strict=True)]
    batch = frames_room._collate(samples)
    assert batch.broken == 7
    assert batch.frames.shape == (3, 4, 4, 3)


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "spawn")])
def test_workers_are_no_copies_of_the_trainer_and_outlive_its_stop_signals(
    monkeypatch: pytest.MonkeyPatch, workers: int, context: str | None
) -> None:
    """Decoders hang in a forked process; a signal to the whole group ends the trainer, not them."""
    given: dict[str, Any] = {}

    def loader(_: object, **settings: Any) -> list[Any]:
        given.update(settings)
        return []

    monkeypatch.setattr(frames_room, "DataLoader", loader)
    assert list(load(Signed(Path()), [], workers)) == []
    assert given["multiprocessing_context"] == context
    assert given["num_workers"] == workers
    assert given["worker_init_fn"] is outlive_stop_signals


def test_frames_become_images_on_the_device() -> None:
    batch = frames_room.Batch(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), 0)
    assert batch.images(torch.device("cpu")).eq(-1).all()
    # "meta" stands for a GPU.
    images = batch.images(torch.device("meta"))
    assert (images.device.type, images.shape) == ("meta", (2, 3, 4, 4))


def test_no_more_workers_are_started_than_have_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone_process()
    started: list[int] = []

    def load(dataset: Signed, draws: Any, workers: int) -> Any:
        started.append(workers)
        return frames_room.load(dataset, draws, 0)

    monkeypatch.setattr(evaluation_room, "load", load)
    for workers in (2, 9):
        evaluate_vqgan(small_vqgan(), Signed(tmp_path), 4, torch.device("cpu"), workers)
    assert started == [2, 3]
