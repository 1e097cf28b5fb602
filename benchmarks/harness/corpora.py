"""Tokenizers and corpora of random tokens in a recipe's sizes: speed does not depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_nuwa.data.batches import IMAGE_TASKS, SKETCH_TASKS
from megatron_nuwa.data.shard_tar import GROUP_ITEMS
from megatron_nuwa.data.shards import (
    FORMAT_VERSION,
    CorpusManifest,
    Counts,
    Fingerprints,
    ShardItem,
    write_settings,
    write_shard,
)
from megatron_nuwa.data.text import TextTokenizer, train_bpe
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import Vqgan, fingerprint, save_vqgan
from megatron_nuwa.training.recipe import Recipe

_CAPTIONS = ["a ginger cat looks to the right", "the lights shine on the dark globe"]
_CLIP_FRAMES = 8


def make_inputs(folder: Path, recipe: Recipe, items: int) -> list[str]:
    """Write what a pretraining of the recipe reads, `items` an own corpus of each task.

    Returns the overrides that make the recipe read it.
    """
    if recipe.vqgan is None or recipe.model is None or recipe.data is None:
        raise UserError(f"recipe '{recipe.name}' needs the sections vqgan, model and data for this")
    vqgan = Vqgan(recipe.vqgan.model)
    save_vqgan(vqgan, folder / "vqgan.safetensors")
    bpe = train_bpe(_CAPTIONS, min(recipe.model.text_vocabulary, 600))
    bpe.save(folder / "bpe.json")
    overrides = [f"tokenizers.vqgan={folder / 'vqgan.safetensors'}"]
    overrides.append(f"tokenizers.bpe={folder / 'bpe.json'}")
    sketch_vqgan = None
    if recipe.sketch_vqgan is not None:
        sketch_vqgan = Vqgan(recipe.sketch_vqgan.model)
        save_vqgan(sketch_vqgan, folder / "sketch_vqgan.safetensors")
        overrides.append(f"tokenizers.sketch_vqgan={folder / 'sketch_vqgan.safetensors'}")
    h, w, frames = recipe.model.position_grid
    for task in recipe.data.tasks:
        grid = (h, w, 1 if task in IMAGE_TASKS else min(frames, _CLIP_FRAMES))
        seg = sketch_vqgan if task in SKETCH_TASKS else None
        _write_corpus(folder / task, grid, items, bpe, vqgan, seg)
        overrides.append(f"data.tasks.{task}.corpora=[{folder / task}]")
        overrides.append(f"data.tasks.{task}.corpus_weights=null")
    return overrides


def _write_corpus(
    folder: Path,
    grid: tuple[int, int, int],
    items: int,
    bpe: TextTokenizer,
    vqgan: Vqgan,
    sketch_vqgan: Vqgan | None,
) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    codes = vqgan.config.codebook_size
    sketch_codes = None if sketch_vqgan is None else sketch_vqgan.config.codebook_size
    cells = int(np.prod(grid))
    shard = [
        ShardItem(
            f"item-{number}",
            random.integers(0, codes, cells).astype(np.uint16),
            np.stack([bpe.encode(caption) for caption in _CAPTIONS]),
            tuple(_CAPTIONS),
            grid[2],
            f"{number}.mp4",
            sketch=None
            if sketch_codes is None
            else random.integers(0, sketch_codes, cells).astype(np.uint16),
        )
        for number in range(items)
    ]
    write_corpus(folder, grid, shard, bpe, vqgan, sketch_vqgan)


def write_corpus(
    folder: Path,
    grid: tuple[int, int, int],
    shard: Sequence[ShardItem],
    bpe: TextTokenizer,
    vqgan: Vqgan,
    sketch_vqgan: Vqgan | None,
    group_items: int = GROUP_ITEMS,
) -> None:
    """Write a corpus of one shard into an empty folder; clips are at 8 frames a second."""
    sidecar = write_shard(folder, 0, shard, group_items=group_items)
    manifest = CorpusManifest(
        format_version=FORMAT_VERSION,
        grid=grid,
        frames_per_second=None if grid[2] == 1 else 8.0,
        codebook_size=vqgan.config.codebook_size,
        sketch_codebook_size=None if sketch_vqgan is None else sketch_vqgan.config.codebook_size,
        text_vocabulary_size=bpe.vocabulary_size,
        fingerprints=Fingerprints(
            vqgan=fingerprint(vqgan),
            bpe=bpe.fingerprint,
            decode="0" * 64,
            sketch=None if sketch_vqgan is None else fingerprint(sketch_vqgan),
        ),
        counts=Counts(items=sidecar.items, captions=sidecar.captions, failed=0),
        shards=(sidecar.entry(),),
    )
    write_settings(folder / "corpus.json", manifest)
