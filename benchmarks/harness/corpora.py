"""Tokenizers and corpora of random tokens in a recipe's sizes: speed does not depend on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

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
    h, w, frames = recipe.model.position_grid
    for task in recipe.data.tasks:
        grid = (h, w, 1 if task == "t2i" else min(frames, _CLIP_FRAMES))
        _write_corpus(folder / task, grid, items, bpe, vqgan)
        overrides.append(f"data.tasks.{task}.corpora=[{folder / task}]")
        overrides.append(f"data.tasks.{task}.corpus_weights=null")
    return overrides


def _write_corpus(
    folder: Path, grid: tuple[int, int, int], items: int, bpe: TextTokenizer, vqgan: Vqgan
) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    codes = vqgan.config.codebook_size
    shard = [
        ShardItem(
            f"item-{number}",
            random.integers(0, codes, int(np.prod(grid))).astype(np.uint16),
            np.stack([bpe.encode(caption) for caption in _CAPTIONS]),
            tuple(_CAPTIONS),
            grid[2],
            f"{number}.mp4",
        )
        for number in range(items)
    ]
    sidecar = write_shard(folder, 0, shard)
    manifest = CorpusManifest(
        format_version=FORMAT_VERSION,
        grid=grid,
        frames_per_second=None if grid[2] == 1 else 8.0,
        codebook_size=codes,
        text_vocabulary_size=bpe.vocabulary_size,
        fingerprints=Fingerprints(vqgan=fingerprint(vqgan), bpe=bpe.fingerprint, decode="0" * 64),
        counts=Counts(items=sidecar.items, captions=sidecar.captions, failed=0),
        shards=(sidecar.entry(),),
    )
    write_settings(folder / "corpus.json", manifest)
