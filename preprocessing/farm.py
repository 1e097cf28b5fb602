"""The farm: ranks that turn a manifest's media and captions into the shards of a corpus."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from megatron_nuwa.config import Settings
from megatron_nuwa.data.shards import Failure, Fingerprints, ShardItem, Sidecar, write_shard
from megatron_nuwa.data.text import LARGEST_VOCABULARY, NO_CAPTION, TextTokenizer
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sha256_of
from megatron_nuwa.models.vqgan import Vqgan, fingerprint, load_vqgan
from megatron_nuwa.training.progress import track
from preprocessing.communicator import Communicator, on_every_rank, on_first_rank
from preprocessing.decoders import DecodeError, DecodeSettings, decode, media_kind
from preprocessing.encoder import BatchEncoder, prepare_device
from preprocessing.ledger import FAILURES_FILE, CorpusSettings, Ledger
from preprocessing.sources import SourceItem, read_manifest

CLIP_FRAMES = 10
CLIP_FRAMES_PER_SECOND = 2.5
SHOWN_FAILURES = 5


class TokenizeOptions(Settings):
    """What `tokenize` is asked for; `frames` None follows the manifest's first item."""

    source: Path
    output: Path
    vqgan: Path
    bpe: Path
    frames: int | None = Field(default=None, ge=1)
    frames_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    short_clips: Literal["skip", "pad"] = "skip"
    items_per_shard: int = Field(default=4096, ge=1)
    batch_size: int = Field(default=32, ge=1)
    long_captions: Literal["refuse", "truncate"] = "refuse"


@dataclass(frozen=True)
class Tools:
    """What a rank works with."""

    vqgan: Vqgan
    bpe: TextTokenizer


def tokenize(options: TokenizeOptions, communicator: Communicator) -> None:
    """Make a corpus, or complete one; every rank makes this call.

    Raises `UserError` (on the first rank, `PeerFailed` on the others) before anything is written
    where the manifest, the VQ-GAN, the BPE or the output folder will not do, and where not a
    single item is good.
    """
    first = communicator.rank == 0
    items = on_first_rank(communicator, lambda: read_manifest(options.source))
    tools = on_every_rank(communicator, lambda: _load_tools(options))
    settings = on_first_rank(communicator, lambda: _settle(options, items, tools))
    ledger = Ledger(options.output, settings)
    finished = on_first_rank(communicator, lambda: _begin(ledger))
    if finished:
        if first:
            print(f"corpus {options.output} is finished already", flush=True)
        return
    pending = on_first_rank(communicator, ledger.pending)
    shards = _Shards(items, settings, options, tools)
    began = time.monotonic()
    on_every_rank(communicator, lambda: _work(shards, pending, communicator))
    on_first_rank(communicator, lambda: _finish(ledger, options, pending, began))


def _load_tools(options: TokenizeOptions) -> Tools:
    vqgan = load_vqgan(options.vqgan)
    bpe = TextTokenizer.load(options.bpe)
    if bpe.vocabulary_size > LARGEST_VOCABULARY:
        raise UserError(
            f"BPE {options.bpe} has {bpe.vocabulary_size:,} tokens, and a corpus holds at most "
            f"{LARGEST_VOCABULARY:,}"
        )
    if vqgan.config.codebook_size > LARGEST_VOCABULARY:
        raise UserError(
            f"VQ-GAN {options.vqgan} has {vqgan.config.codebook_size:,} codes, and a corpus holds "
            f"at most {LARGEST_VOCABULARY:,}"
        )
    return Tools(prepare_device(vqgan, _local_rank()), bpe)


def _settle(options: TokenizeOptions, items: Sequence[SourceItem], tools: Tools) -> CorpusSettings:
    """Every setting of the corpus, defaults filled in."""
    decode_settings = _decode_settings(options, items, tools.vqgan.config.image_size)
    return CorpusSettings(
        manifest_sha256=sha256_of(options.source),
        manifest_items=len(items),
        decode=decode_settings,
        grid_side=tools.vqgan.grid_side,
        codebook_size=tools.vqgan.config.codebook_size,
        text_vocabulary_size=tools.bpe.vocabulary_size,
        fingerprints=Fingerprints(
            vqgan=fingerprint(tools.vqgan),
            bpe=tools.bpe.fingerprint,
            decode=decode_settings.fingerprint(),
        ),
        items_per_shard=options.items_per_shard,
        batch_size=options.batch_size,
        long_captions=options.long_captions,
    )


def _decode_settings(
    options: TokenizeOptions, items: Sequence[SourceItem], image_size: int
) -> DecodeSettings:
    frames = options.frames or _default_frames(items)
    if frames == 1:
        if options.frames_per_second is not None:
            raise UserError("--fps is given, but a corpus of images has no frame rate")
        return DecodeSettings(image_size=image_size)
    return DecodeSettings(
        image_size=image_size,
        frames=frames,
        frames_per_second=options.frames_per_second or CLIP_FRAMES_PER_SECOND,
        short_clips=options.short_clips,
    )


def _default_frames(items: Sequence[SourceItem]) -> int:
    """1 where the first item that can be read is an image, else the paper's 10."""
    complaint = None
    for item in items:
        try:
            return 1 if media_kind(item.media) == "image" else CLIP_FRAMES
        except DecodeError as error:
            complaint = complaint or error
    raise UserError(f"not one media file of the manifest can be read; the first: {complaint}")


def _begin(ledger: Ledger) -> bool:
    """Open the corpus for writing; true where there is nothing left to write."""
    try:
        ledger.check()
        if ledger.is_finished():
            return True
        ledger.begin()
    except OSError as error:
        raise UserError(
            f"output {ledger.folder} cannot be written: {error.strerror or error}"
        ) from error
    return False


class _Shards:
    """Makes shards, one at a time."""

    def __init__(
        self,
        items: Sequence[SourceItem],
        settings: CorpusSettings,
        options: TokenizeOptions,
        tools: Tools,
    ) -> None:
        self.settings = settings
        self._items = items
        self._folder = options.output
        self._media_folder = options.source.parent
        self._tools = tools
        self._repeated = _repeated_rows(items)

    def make(self, shard: int) -> Iterator[None]:
        """Write one shard, yielding after each of its items; `UserError` where writing fails."""
        encoder = BatchEncoder(self._tools.vqgan, self.settings.batch_size)
        good: list[tuple[SourceItem, np.ndarray, int]] = []
        failures: list[Failure] = []
        for row in self.settings.rows(shard):
            item = self._items[row]
            try:
                text = self._text(item, row)
                frames, real = decode(item.media, self.settings.decode, item.start, item.end)
            except UserError as error:
                failures.append(Failure(id=item.id, reason=str(error)))
            else:
                encoder.add(frames)
                good.append((item, text, real))
            yield
        # (frames, h, w) → one row of frame-major tokens for each item: generation order.
        visual = encoder.finish().reshape(len(good), -1) if good else np.empty((0, 0))
        made = [
            self._shard_item(*parts, tokens) for parts, tokens in zip(good, visual, strict=True)
        ]
        try:
            write_shard(self._folder, shard, made, failures)
        except OSError as error:
            raise UserError(
                f"output {self._folder} cannot be written: {error.strerror or error}"
            ) from error

    def _text(self, item: SourceItem, row: int) -> np.ndarray:
        if row in self._repeated:
            raise UserError(f"the id {item.id!r} stands in an earlier line of the manifest too")
        if not item.captions:
            raise UserError(
                f'item {item.id!r} has no caption; give it "{NO_CAPTION}" where it has none'
            )
        truncate = self.settings.long_captions == "truncate"
        return np.stack([self._tools.bpe.encode(text, truncate=truncate) for text in item.captions])

    def _shard_item(
        self, item: SourceItem, text: np.ndarray, real: int, visual: np.ndarray
    ) -> ShardItem:
        media = item.media
        if media.is_relative_to(self._media_folder):
            media = media.relative_to(self._media_folder)
        return ShardItem(
            id=item.id,
            visual=visual,
            text=text,
            captions=item.captions,
            frames=real,
            media=media.as_posix(),
            start=item.start,
            end=item.end,
        )


def _repeated_rows(items: Sequence[SourceItem]) -> set[int]:
    seen: set[str] = set()
    repeated = set()
    for row, item in enumerate(items):
        if item.id in seen:
            repeated.add(row)
        seen.add(item.id)
    return repeated


def _work(shards: _Shards, pending: Sequence[int], communicator: Communicator) -> None:
    """Make this rank's share of the pending shards; the first rank shows everybody's progress."""
    mine = pending[communicator.rank :: communicator.size]
    if communicator.rank:
        for _ in _own_work(shards, mine, communicator):
            communicator.report(1)
        return
    total = sum(len(shards.settings.rows(shard)) for shard in pending)
    everybody = _everybodys_work(shards, mine, communicator, total)
    for _ in track(everybody, "tokenize", total=total):
        pass


def _own_work(shards: _Shards, mine: Sequence[int], communicator: Communicator) -> Iterator[None]:
    for shard in mine:
        for _ in shards.make(shard):
            yield
            if communicator.is_asked_to_stop():
                return


def _everybodys_work(
    shards: _Shards, mine: Sequence[int], communicator: Communicator, total: int
) -> Iterator[None]:
    """Do the first rank's work, yielding once for each item that any rank has done."""
    done = 0
    for _ in _own_work(shards, mine, communicator):
        others = communicator.reported()
        done += 1 + others
        yield from [None] * (1 + others)
    while done < total and not communicator.is_asked_to_stop():
        others = communicator.reported()
        done += others
        yield from [None] * others
        time.sleep(0.02)


def _finish(ledger: Ledger, options: TokenizeOptions, made: Sequence[int], began: float) -> None:
    """Commit the corpus and say what became of the items."""
    sidecars = ledger.sidecars()
    failures = [failure for sidecar in sidecars for failure in sidecar.failures]
    if not any(sidecar.items for sidecar in sidecars):
        ledger.discard()
        raise UserError(
            f"all {len(failures)} items of {options.source} failed, so there is no corpus; "
            f"the first: {failures[0].reason}"
        )
    manifest = ledger.commit(sidecars)
    seconds = time.monotonic() - began
    items = sum(_handled(sidecars[shard]) for shard in made)
    print(
        f"corpus {options.output}: {manifest.counts.items} items, "
        f"{manifest.counts.captions} captions, {manifest.counts.failed} failed; "
        f"{len(made)} shards in {seconds:.1f} s, {items / seconds:.1f} items/s",
        flush=True,
    )
    for failure in failures[:SHOWN_FAILURES]:
        print(f"  failed {failure.id}: {failure.reason}", flush=True)
    if len(failures) > SHOWN_FAILURES:
        more = len(failures) - SHOWN_FAILURES
        print(f"  and {more} more, in {options.output / FAILURES_FILE}", flush=True)


def _handled(sidecar: Sidecar) -> int:
    return sidecar.items + len(sidecar.failures)


def _local_rank() -> int:
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0
