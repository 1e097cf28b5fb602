"""What a corpus in the making knows of itself: its settings, which shards are done, the end."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.data.shard_list import ShardEntry, ShardList
from megatron_nuwa.data.shards import (
    CORPUS_FILE,
    FORMAT_VERSION,
    CorpusManifest,
    Counts,
    Failure,
    Fingerprints,
    Sidecar,
    commit_corpus,
    read_json,
    read_sidecar,
    shard_name,
    write_settings,
)
from megatron_nuwa.decoders import DecodeSettings
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sync, written_atomically
from preprocessing.encoder import EncoderSettings
from preprocessing.filters import NEAR_DUPLICATES, FilterSettings
from preprocessing.isolation import SketchSettings
from preprocessing.sources import Source

# Raised whenever the same frames and settings would be encoded in other batches than before.
ENCODE_RULES_VERSION = 2
SETTINGS_FILE = "settings.json"
FAILURES_FILE = "failures.jsonl"


class CorpusSettings(Settings):
    """Everything that decides the bytes of a corpus, written before its first shard."""

    format_version: int = FORMAT_VERSION
    manifest_sha256: str
    manifest_items: int = Field(ge=1)
    decode: DecodeSettings
    grid_side: int = Field(ge=1)
    codebook_size: int = Field(ge=1)
    text_vocabulary_size: int = Field(ge=1)
    fingerprints: Fingerprints
    items_per_shard: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    long_captions: Literal["refuse", "truncate"]
    filters: FilterSettings = FilterSettings()
    # None for a corpus without sketches.
    sketch: SketchSettings | None = None
    # Corpora begun before the farm had these fields were made in another way.
    encode_rules: int = 1
    encoder: EncoderSettings = EncoderSettings(device="cpu", precision="float32", compiled=False)

    @property
    def items_per_batch(self) -> int:
        """Items whose frames the VQ-GAN encodes together."""
        return max(1, self.batch_size // self.decode.frames)

    @property
    def frames_at_once(self) -> int:
        """Frames of one pass through the VQ-GAN: of a batch whose items are all there."""
        return min(self.batch_size, self.items_per_batch * self.decode.frames)

    @property
    def shards(self) -> int:
        """Number of shards, those without a good item included."""
        return -(-self.manifest_items // self.items_per_shard)

    def rows(self, shard: int) -> range:
        """The manifest's rows that a shard covers."""
        start = shard * self.items_per_shard
        return range(start, min(start + self.items_per_shard, self.manifest_items))


def items_begun(folder: Path, source: Source) -> int | None:
    """How many items a corpus has that was begun from this source; None where there is none."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        written = parse_settings(CorpusSettings, read_json(path), str(path))
    except UserError:
        return None
    return written.manifest_items if written.manifest_sha256 == source.fingerprint else None


class Ledger:
    """The files of a corpus that say how far it is; only the first rank changes them."""

    def __init__(self, folder: Path, settings: CorpusSettings) -> None:
        self.folder = folder
        self.settings = settings

    def check(self) -> None:
        """`UserError` where the folder holds something else, or a corpus of other settings."""
        path = self.folder / SETTINGS_FILE
        if path.exists():
            written = parse_settings(CorpusSettings, read_json(path), str(path))
            difference = _difference(written, self.settings)
            if difference:
                raise UserError(
                    f"corpus {self.folder} was begun with {difference}; repeat the first command "
                    f"to complete it, or name another --output"
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self._foreign_files())):
            raise UserError(f"output {self.folder} exists and is not a corpus; name another folder")

    def pending(self) -> list[int]:
        """Shards whose sidecar or tar is absent or of another size."""
        return [shard for shard in range(self.settings.shards) if not self._is_complete(shard)]

    def is_committed(self) -> bool:
        """Whether the corpus has its commit."""
        return (self.folder / CORPUS_FILE).exists()

    def is_finished(self) -> bool:
        """Whether the corpus has its commit and all of its shards."""
        return self.is_committed() and not self.pending()

    def is_new(self) -> bool:
        """Whether nothing has been written yet."""
        return not (self.folder / SETTINGS_FILE).exists()

    def reopen_failed(self) -> None:
        """Have every shard that holds a failed item made anew.

        The whole shard, so that its bytes are those of a run in which the item never failed. What
        has lost near-duplicates is made anew too: an item that is good now may look like them.
        """
        if not self.has_failed():
            return
        (self.folder / CORPUS_FILE).unlink(missing_ok=True)
        for shard in range(self.settings.shards):
            failures = self._failures_of(shard)
            if any(failure.filter in (None, NEAR_DUPLICATES) for failure in failures):
                self._sidecar_path(shard).unlink()
        # Whoever notes that this is done must find it done when the power is back.
        sync(self.folder)

    def begin(self) -> None:
        """Write the settings, and take back the commit and the remains of an earlier run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / CORPUS_FILE).unlink(missing_ok=True)
        self._remove_temporary_files()
        write_settings(self.folder / SETTINGS_FILE, self.settings)

    def has_failed(self) -> bool:
        """Whether an item of the shards that are there has failed."""
        return any(failure.filter is None for failure in self._failures())

    def first_failures(self, count: int) -> list[Failure]:
        """The first failures of a corpus whose shards are all there."""
        failed = (failure for failure in self._failures() if failure.filter is None)
        return list(itertools.islice(failed, count))

    def first_reason(self) -> str:
        """Why the first item that is not in the corpus is not."""
        return next(self._failures()).reason

    def commit(self) -> CorpusManifest | None:
        """Write `failures.jsonl` and, last of all, `corpus.json`; None where no item is good."""
        settings = self.settings
        empty: list[str] = []
        left_out: Counter[str | None] = Counter()

        def entries() -> Iterator[ShardEntry]:
            for shard in range(settings.shards):
                sidecar = self._written(shard)
                for failure in sidecar.failures:
                    stream.write(failure_line(failure).encode() + b"\n")
                    left_out[failure.filter] += 1
                if sidecar.items:
                    yield sidecar.entry()
                else:
                    empty.append(f"{sidecar.shard}.json")

        with written_atomically(self.folder / FAILURES_FILE) as stream:
            shards = ShardList.of(entries())
        if not shards:
            return None
        frames = settings.decode.frames
        manifest = CorpusManifest(
            format_version=FORMAT_VERSION,
            grid=(settings.grid_side, settings.grid_side, frames),
            frames_per_second=None if frames == 1 else settings.decode.frames_per_second,
            codebook_size=settings.codebook_size,
            sketch_codebook_size=settings.sketch.codebook_size if settings.sketch else None,
            text_vocabulary_size=settings.text_vocabulary_size,
            fingerprints=settings.fingerprints,
            counts=Counts(
                items=shards.total("items"),
                captions=shards.total("captions"),
                failed=left_out.pop(None, 0),
                left_out={name: count for name, count in sorted(left_out.items()) if name},
            ),
            shards=shards,
        )
        # The commit must not reach the disk before the names of the files that it lists.
        sync(self.folder)
        manifest = commit_corpus(self.folder, manifest, [SETTINGS_FILE, FAILURES_FILE, *empty])
        sync(self.folder)
        return manifest

    def discard(self) -> None:
        """Remove what was written for a corpus that has not a single item."""
        self._remove_temporary_files()
        for shard in range(self.settings.shards):
            self._sidecar_path(shard).unlink(missing_ok=True)
        (self.folder / FAILURES_FILE).unlink(missing_ok=True)
        (self.folder / SETTINGS_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _failures(self) -> Iterator[Failure]:
        for shard in range(self.settings.shards):
            yield from self._failures_of(shard)

    def _failures_of(self, shard: int) -> Sequence[Failure]:
        """Empty where the sidecar is absent or damaged: such a shard is made anew."""
        try:
            return read_sidecar(self._sidecar_path(shard)).failures
        except UserError:
            return ()

    def _written(self, shard: int) -> Sidecar:
        path = self._sidecar_path(shard)
        if not path.exists():
            raise UserError(
                f"{path} has gone while the farm was at work; repeat the command to make it anew"
            )
        return read_sidecar(path)

    def _sidecar_path(self, shard: int) -> Path:
        return self.folder / f"{shard_name(shard)}.json"

    def _is_complete(self, shard: int) -> bool:
        try:
            sidecar = read_sidecar(self._sidecar_path(shard))
            tar = self.folder / f"{sidecar.shard}.tar"
            return not sidecar.items or tar.stat().st_size == sidecar.bytes
        except (UserError, OSError):
            return False

    def _foreign_files(self) -> list[Path]:
        # The first file that a farm writes has a hidden name until it is complete.
        return [
            path for path in self.folder.iterdir() if not path.name.startswith(f".{SETTINGS_FILE}")
        ]

    def _remove_temporary_files(self) -> None:
        for name in ("shard-*", SETTINGS_FILE, FAILURES_FILE, CORPUS_FILE):
            for path in self.folder.glob(f".{name}.*"):
                path.unlink(missing_ok=True)


def failure_line(failure: Failure) -> str:
    """An item's line in `failures.jsonl`."""
    tree = failure.model_dump(exclude_none=True, exclude={"duplicate"})
    return json.dumps(tree, ensure_ascii=False)


def _difference(written: CorpusSettings, asked: CorpusSettings) -> str:
    """The first setting that differs, in words; empty where none does."""
    if written.manifest_sha256 != asked.manifest_sha256:
        return "another content of the manifest"
    if written.fingerprints.vqgan != asked.fingerprints.vqgan:
        return "another VQ-GAN"
    if written.fingerprints.bpe != asked.fingerprints.bpe:
        return "another BPE"
    if (written.sketch is None) != (asked.sketch is None):
        return "sketches (--sketch-vqgan)" if written.sketch else "no sketches (--sketch-vqgan)"
    if written.fingerprints.sketch != asked.fingerprints.sketch:
        return "another VQ-GAN-Seg (--sketch-vqgan)"
    before, now = _flat(written), _flat(asked)
    for name, value in now.items():
        if before.get(name) != value:
            return f"{name} = {before.get(name)}, and now it is {value}"
    return ""


def _flat(settings: CorpusSettings) -> dict[str, object]:
    tree = settings.model_dump(mode="json")
    sketch = {f"sketch_{name}": value for name, value in (tree.pop("sketch") or {}).items()}
    return {**tree.pop("decode"), **tree.pop("encoder"), **tree.pop("filters"), **sketch, **tree}
