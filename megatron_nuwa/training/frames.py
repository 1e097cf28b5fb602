"""Frames for training a VQ-GAN: from a file of them, or decoded while training; batched."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_nuwa.errors import MachineError, UserError
from megatron_nuwa.training.stopping import outlive_stop_signals, workers_start

# Decoding moves on to the next item after a broken one, but not for ever.
_ATTEMPTS = 20


@dataclass(frozen=True)
class MediaFrames:
    """Media items that can be decoded: the bridge to whoever reads manifests and media.

    `decode(item)` gives an item's real frames, uint8 (frames, size, size, 3), or maps of classes,
    uint8 (frames, size, size), where `are_maps`, and raises `UserError` for a broken one,
    `MachineError` where that says nothing of the item; `key` changes whenever any frame may, and
    calls its argument often while it looks at the files; `name` is for messages. Every worker of a
    loader gets a copy, so `items` should hold little.
    """

    items: Sequence[object]
    decode: Callable[[object], np.ndarray]
    size: int
    key: Callable[[Callable[[], None]], str]
    name: str
    are_maps: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one frame."""
        return (self.size, self.size) if self.are_maps else (self.size, self.size, 3)


class Draw(NamedTuple):
    """Which item of a dataset, and a number that decides what is random about it."""

    place: int
    number: int


class Sample(NamedTuple):
    """One frame uint8 (size, size[, 3]), and how many broken items were passed over to get it."""

    frame: np.ndarray
    broken: int


class CachedFrames(Dataset[Sample]):
    """Frames in a memory-mapped .npy file."""

    def __init__(self, path: Path) -> None:
        self._frames = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, draw: Draw) -> Sample:
        return Sample(self._frames[draw.place], 0)


class DecodedFrames(Dataset[Sample]):
    """One frame of an item, decoded when asked for."""

    def __init__(self, media: MediaFrames) -> None:
        self._media = media

    def __len__(self) -> int:
        return len(self._media.items)

    def __getitem__(self, draw: Draw) -> Sample:
        for broken in range(min(_ATTEMPTS, len(self))):
            place = (draw.place + broken) % len(self)
            try:
                frames = self._media.decode(self._media.items[place])
            except MachineError:
                raise
            except UserError as error:
                reason = error
                continue
            choice = np.random.default_rng(draw.number).integers(len(frames))
            return Sample(frames[choice], broken)
        raise UserError(
            f"{self._media.name}: {min(_ATTEMPTS, len(self))} items in a row cannot be decoded; "
            f"the last one: {reason}"
        )


class Batch(NamedTuple):
    """Frames uint8 (batch, H, W, 3), or maps (batch, H, W); `broken` items were passed over."""

    frames: Tensor
    broken: int

    def images(self, device: torch.device) -> Tensor:
        """`to_images` on the device, which gets a quarter of what floats would be."""
        return to_images(self.frames.to(device))


def batches(
    dataset: Dataset[Sample],
    *,
    image_size: int,
    flip: bool,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    first_step: int,
    steps: int,
    workers: int,
) -> Generator[Batch, None, None]:
    """This process's batches from step `first_step` to `steps`, each a function of (seed, step).

    Over all processes a step takes `batch_size` frames, the next ones of an endless series of
    shuffled passes over the dataset.
    """
    mine = batch_size // world_size
    shuffled = _ShuffledPasses(seed, len(dataset))  # type: ignore[arg-type]
    starts = (step * batch_size + rank * mine for step in range(first_step, steps))
    draws = ([Draw(shuffled[start + n], start + n) for n in range(mine)] for start in starts)
    if first_step == steps:
        return  # Workers take seconds to start.
    for step, (frames, broken) in enumerate(load(dataset, draws, workers), start=first_step):
        generator = torch.Generator().manual_seed(_mixed(seed, step, rank))
        yield Batch(_augment(frames, image_size, flip, generator), broken)


def load(
    dataset: Dataset[Sample], draws: Iterable[Sequence[Draw]], workers: int
) -> Iterator[Batch]:
    """Whole frames, batch by batch in the order of `draws`, decoded by `workers` processes.

    Raises `UserError` as the dataset does.
    """
    loader = DataLoader(
        _Told(dataset),
        batch_sampler=draws,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=outlive_stop_signals,
        # Decoders start threads and processes, which a forked copy of this process could not.
        multiprocessing_context="spawn" if workers else None,
    )
    with workers_start() if workers else nullcontext():
        found = iter(loader)
    for batch in found:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Told(Dataset[Sample | UserError]):
    """A dataset whose mistakes come as values: PyTorch adds a worker's traceback to errors."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self._dataset = dataset

    def __getitem__(self, draw: Draw) -> Sample | UserError:
        try:
            return self._dataset[draw]
        except UserError as error:
            return error


def to_images(frames: Tensor) -> Tensor:
    """Bytes (batch, H, W, 3) as images (batch, 3, H, W) in [-1, 1]; maps (batch, H, W) as such."""
    if frames.ndim == 3:
        return frames
    return frames.movedim(-1, 1).float().div_(127.5).sub_(1)


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (batch, 3, H, W) in [-1, 1] as bytes (batch, H, W, 3)."""
    scaled = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return scaled.movedim(1, -1).cpu().numpy()


class _ShuffledPasses:
    """An endless series of shuffled passes over `total` items, by position."""

    def __init__(self, seed: int, total: int) -> None:
        self._seed = seed
        self._total = total
        self._number = -1

    def __getitem__(self, position: int) -> int:
        number, offset = divmod(position, self._total)
        if number != self._number:
            self._number = number
            self._order = np.random.default_rng((self._seed, number)).permutation(self._total)
        return int(self._order[offset])


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _collate(found: list[Sample | UserError]) -> Batch | UserError:
    if mistake := next((each for each in found if isinstance(each, UserError)), None):
        return mistake
    samples = [each for each in found if isinstance(each, Sample)]
    frames = np.stack([sample.frame for sample in samples])
    return Batch(torch.from_numpy(frames), sum(sample.broken for sample in samples))


def _augment(frames: Tensor, size: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop each frame at random to `size` pixels and mirror half of them."""
    count, side = frames.shape[0], frames.shape[1]
    corners = torch.randint(0, side - size + 1, (count, 2), generator=generator).tolist()
    cropped = [
        frame[top : top + size, left : left + size]
        for frame, (top, left) in zip(frames, corners, strict=True)
    ]
    mirrored = torch.rand(count, generator=generator) < 0.5
    return torch.stack(
        [
            frame.flip(1) if flip and mirror else frame
            for frame, mirror in zip(cropped, mirrored.tolist(), strict=True)
        ]
    )
