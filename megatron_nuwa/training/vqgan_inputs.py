"""The frames that a VQ-GAN's recipe asks for: opened, batched."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from megatron_nuwa.training.frame_cache import CacheReport, cache_frames, known_cache
from megatron_nuwa.training.frames import (
    Batch,
    CachedFrames,
    DecodedFrames,
    Draw,
    MediaFrames,
    Sample,
    batches,
)
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.vqgan_recipe import VqganRecipe

_KMEANS_SEED = 1_000_003


def open_dataset(
    recipe: VqganRecipe,
    media: MediaFrames,
    cache: Path,
    processes: Processes,
    turn: Callable[[], None] = lambda: None,
) -> Dataset[Sample]:
    """The frames of `media`, decoded into `cache` first where the recipe says so.

    Called by all processes together; the first one decodes, while all take a `turn` together every
    few seconds. `UserError` where nothing can be decoded.
    """
    if not recipe.data.cache_frames:
        decoded = DecodedFrames(media)
        # The first pass would come to it.
        processes.first_then_all(lambda: decoded[Draw(0, 0)] if processes.is_first else None)
        return decoded

    def decode(go_on: Callable[[], None]) -> CacheReport:
        return cache_frames(media, cache, f"decoding {media.name}", go_on)

    report = processes.first_works(decode, turn)
    if processes.is_first:
        _tell_cache(report, media, cache)
    found = known_cache(cache)
    absent = None
    if found is None or found.key != report.key:
        absent = (
            f"{socket.gethostname()}, process {processes.rank}: does not see the frames that the "
            f"first process has written to {cache}; {recipe.section}.run must lie on a file system "
            "that all nodes mount"
        )
    processes.raise_first(absent)
    return CachedFrames(cache)


def _tell_cache(report: CacheReport, media: MediaFrames, cache: Path) -> None:
    verb = "reusing" if report.reused else "decoded"
    before = f", {report.begun} of them before this start" if report.begun else ""
    print(
        f"{media.name}: {verb} {report.frames} frames of {report.items} items{before} in {cache}",
        flush=True,
    )
    if report.failures:
        print(
            f"{media.name}: {len(report.failures)} items cannot be decoded and are left out; "
            f"the first: {report.failures[0]}",
            flush=True,
        )


def training_batches(
    recipe: VqganRecipe,
    seed: int,
    processes: Processes,
    frames: Dataset[Sample],
    first_step: int,
    steps: int,
) -> Generator[Batch, None, None]:
    """This process's batches from `first_step` to `steps`."""
    return batches(
        frames,
        image_size=recipe.model.image_size,
        flip=recipe.data.flip,
        seed=seed,
        batch_size=recipe.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        first_step=first_step,
        steps=steps,
        workers=recipe.data.loading_workers,
    )


def kmeans_batches(
    recipe: VqganRecipe, seed: int, processes: Processes, frames: Dataset[Sample]
) -> Generator[Tensor, None, None]:
    """Batches of frames for the k-means start, from another shuffle than the training's."""
    enough = recipe.codebook.kmeans_vectors + recipe.model.codebook_size
    other_seed = seed + _KMEANS_SEED
    with closing(training_batches(recipe, other_seed, processes, frames, 0, enough)) as found:
        for batch in found:
            yield batch.images(processes.device)
