"""Token loaders: ours, a tar with files for every sample, and those that others publish.

Each writes the same tokens in its own format and then gives shuffled batches without end, visual
tokens (batch, cells) and text tokens (batch, 77) as int64 tensors, in one process.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor

from benchmarks.harness.unavailable import UnavailableError
from megatron_nuwa.data.batches import TaskBatches
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shards import (
    FORMAT_VERSION,
    CorpusManifest,
    Counts,
    Fingerprints,
    ShardItem,
    write_settings,
    write_shard,
)
from megatron_nuwa.data.text import TEXT_TOKENS, train_bpe
from megatron_nuwa.grid import Grid

OURS, NAIVE, PACKED = "megatron_nuwa", "webdataset, files a sample", "webdataset, our tars"
STREAMING, LITDATA = "mosaicml-streaming", "litdata"
_CODES, _WORDS, _SHARD_ITEMS = 12_288, 520, 4096
_CAPTION = "a caption of the usual length, some sixty characters long."
Batch = tuple[Tensor, Tensor]
OpenBatches = Callable[[], Generator[Batch, None, None]]


@dataclass(frozen=True)
class Tokens:
    """What every loader is given: uint16, `text` with the item's number in its first two."""

    grid: Grid
    visual: np.ndarray
    text: np.ndarray

    @classmethod
    def random(cls, grid: Grid, items: int) -> Tokens:
        """As many random items, at most 65,536 so that the number fits."""
        random = np.random.default_rng(0)
        text = random.integers(1, _WORDS, (items, TEXT_TOKENS), np.uint16)
        text[:, 0], text[:, 1] = np.arange(items) & 255, np.arange(items) >> 8
        return cls(grid, random.integers(0, _CODES, (items, grid.cells), np.uint16), text)


def ours(folder: Path, tokens: Tokens, batch: int) -> OpenBatches:
    """Random items of the memory-mapped shards in the sampling order, as training reads them."""
    write_our_corpus(folder, tokens)
    bpe = train_bpe([_CAPTION], _WORDS)

    def open_batches() -> Generator[Batch, None, None]:
        task = "t2i" if tokens.grid.s == 1 else "t2v"
        batches = TaskBatches(task, [Corpus(folder)], bpe, seed=0, batch_size=batch)
        for step in itertools.count():
            for part in batches.micro_batches(step, 0, 1):
                yield part.target, part.context.tokens

    return open_batches


def write_our_corpus(folder: Path, tokens: Tokens) -> None:
    """The tokens as a corpus."""
    items = [
        ShardItem(f"{number:08d}", visual, text[None], (_CAPTION,), tokens.grid.s, "a.mp4")
        for number, (visual, text) in enumerate(zip(tokens.visual, tokens.text, strict=True))
    ]
    starts = range(0, len(items), _SHARD_ITEMS)
    sidecars = [
        write_shard(folder, number, items[start : start + _SHARD_ITEMS])
        for number, start in enumerate(starts)
    ]
    manifest = CorpusManifest(
        format_version=FORMAT_VERSION,
        grid=tokens.grid,
        frames_per_second=None if tokens.grid.s == 1 else 2.5,
        codebook_size=_CODES,
        text_vocabulary_size=_WORDS,
        fingerprints=Fingerprints(vqgan="v", bpe="b", decode="d"),
        counts=Counts(items=len(items), captions=len(items), failed=0),
        shards=tuple(sidecar.entry() for sidecar in sidecars),
    )
    write_settings(folder / "corpus.json", manifest)


def files_a_sample(folder: Path, tokens: Tokens, batch: int) -> OpenBatches:
    """Stock webdataset over a tar with two npy files and a JSON file for every sample."""
    tar_path = folder / "samples.tar"
    with tarfile.open(tar_path, "w") as tar:
        for number, (visual, text) in enumerate(zip(tokens.visual, tokens.text, strict=True)):
            line = {"id": f"{number:08d}", "captions": [_CAPTION], "media": "a.mp4"}
            content = {
                "v.npy": _npy(visual),
                "t.npy": _npy(text),
                "json": json.dumps(line).encode(),
            }
            for suffix, data in content.items():
                header = tarfile.TarInfo(f"{number:08d}.{suffix}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    pipeline = webdataset.WebDataset([f"file:{tar_path}"], shardshuffle=False)
    samples = pipeline.shuffle(1000).decode().to_tuple("v.npy", "t.npy", "json")

    def open_batches() -> Generator[Batch, None, None]:
        while True:
            yield from _batched(((visual, text) for visual, text, _ in samples), batch)

    return open_batches


def packed_tars(folder: Path, tokens: Tokens, batch: int) -> OpenBatches:
    """Stock webdataset over the tars of our corpus, unpacked and shuffled sample by sample."""
    write_our_corpus(folder, tokens)
    urls = [f"file:{path}" for path in sorted(folder.glob("*.tar"))]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode()
    groups = pipeline.to_tuple("visual.npy", "text.npy")
    rows = webdataset.filters.shuffle(1000)

    def open_batches() -> Generator[Batch, None, None]:
        while True:
            samples = (row for group in groups for row in zip(*group, strict=True))
            yield from _batched(rows(samples), batch)

    return open_batches


def mosaicml_streaming(folder: Path, tokens: Tokens, batch: int) -> OpenBatches:
    """MDS shards of ndarray columns of fixed shape, through its shuffling dataset."""
    streaming = _imported("streaming")
    columns = {"visual": f"ndarray:uint16:{tokens.grid.cells}", "text": "ndarray:uint16:77"}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for visual, text in zip(tokens.visual, tokens.text, strict=True):
            writer.write({"visual": visual, "text": text})
    dataset = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch)

    def open_batches() -> Generator[Batch, None, None]:
        while True:
            yield from _batched(((row["visual"], row["text"]) for row in dataset), batch)

    return open_batches


def lightning_litdata(folder: Path, tokens: Tokens, batch: int) -> OpenBatches:
    """Chunks of numpy arrays, through its shuffling dataset."""
    _imported("litdata")
    writer_module = _imported("litdata.streaming.writer")
    target = folder / "litdata"
    writer = writer_module.BinaryWriter(str(target), chunk_bytes="64MB")
    for number, (visual, text) in enumerate(zip(tokens.visual, tokens.text, strict=True)):
        writer[number] = {"visual": visual, "text": text}
    writer.done()
    writer.merge()
    dataset = _imported("litdata").StreamingDataset(str(target), shuffle=True)

    def open_batches() -> Generator[Batch, None, None]:
        while True:
            yield from _batched(((row["visual"], row["text"]) for row in dataset), batch)

    return open_batches


LOADERS: dict[str, Callable[[Path, Tokens, int], OpenBatches]] = {
    OURS: ours,
    NAIVE: files_a_sample,
    PACKED: packed_tars,
    STREAMING: mosaicml_streaming,
    LITDATA: lightning_litdata,
}


def _batched(samples: Iterator[tuple[np.ndarray, np.ndarray]], size: int) -> Iterator[Batch]:
    while len(rows := list(itertools.islice(samples, size))) == size:
        visual, text = (np.stack(column).astype(np.int64) for column in zip(*rows, strict=True))
        yield torch.from_numpy(visual), torch.from_numpy(text)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(f"import {name} fails: {type(error).__name__}: {reason}") from error
