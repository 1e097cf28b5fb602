"""The frames that a VQ-GAN's recipe asks for: opened, batched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from megatron_nuwa.training.frames import (
    Batch,
    CachedFrames,
    CacheReport,
    DecodedFrames,
    Draw,
    MediaFrames,
    Sample,
    batches,
    cache_frames,
)
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.vqgan_recipe import VqganRecipe

_KMEANS_SEED = 1_000_003


def open_dataset(
    recipe: VqganRecipe, media: MediaFrames, cache: Path, processes: Processes
) -> Dataset[Sample]:
    """The frames of `media`, decoded into `cache` first where the recipe says so.

    Called by all processes together; `UserError` where nothing can be decoded.
    """
    if not recipe.data.cache_frames:
        decoded = DecodedFrames(media)
        # The first pass would come to it.
        processes.first_then_all(lambda: decoded[Draw(0, 0)] if processes.is_first else None)
        return decoded

    def decode() -> CacheReport:
        return cache_frames(media, cache, f"decoding {media.name}")

    # The others find the first one's frames, or decode their own where no disk is shared.
    report = processes.first_then_all(decode)
    if processes.is_first:
        _tell_cache(report, media, cache)
    return CachedFrames(cache)


def _tell_cache(report: CacheReport, media: MediaFrames, cache: Path) -> None:
    verb = "reusing" if report.reused else "decoded"
    print(f"{media.name}: {verb} {report.frames} frames of {report.items} items in {cache}")
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
) -> Iterator[Batch]:
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
        workers=0 if recipe.data.cache_frames else recipe.data.workers,
    )


def kmeans_batches(
    recipe: VqganRecipe, seed: int, processes: Processes, frames: Dataset[Sample]
) -> Iterator[Tensor]:
    """Batches of frames for the k-means start, from another shuffle than the training's."""
    enough = recipe.codebook.kmeans_vectors + recipe.model.codebook_size
    other_seed = seed + _KMEANS_SEED
    for batch in training_batches(recipe, other_seed, processes, frames, 0, enough):
        yield batch.images
