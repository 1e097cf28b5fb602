"""What a corpus in the making knows of itself: its settings, which shards are done, the end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.data.shards import (
    CORPUS_FILE,
    FORMAT_VERSION,
    CorpusManifest,
    Counts,
    Fingerprints,
    Sidecar,
    read_json,
    read_sidecar,
    shard_name,
    write_settings,
)
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import write_text_atomically
from preprocessing.decoders import DecodeSettings

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

    @property
    def shards(self) -> int:
        """Number of shards, those without a good item included."""
        return -(-self.manifest_items // self.items_per_shard)

    def rows(self, shard: int) -> range:
        """The manifest's rows that a shard covers."""
        start = shard * self.items_per_shard
        return range(start, min(start + self.items_per_shard, self.manifest_items))


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

    def is_finished(self) -> bool:
        """Whether the corpus has its commit and all of its shards."""
        return (self.folder / CORPUS_FILE).exists() and not self.pending()

    def begin(self) -> None:
        """Write the settings, and take back the commit and the remains of an earlier run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / CORPUS_FILE).unlink(missing_ok=True)
        self._remove_temporary_files()
        write_settings(self.folder / SETTINGS_FILE, self.settings)

    def sidecars(self) -> list[Sidecar]:
        """The sidecars of all shards, in order."""
        return [read_sidecar(self._sidecar_path(shard)) for shard in range(self.settings.shards)]

    def commit(self, sidecars: Sequence[Sidecar]) -> CorpusManifest:
        """Write `failures.jsonl` and, last of all, `corpus.json`."""
        settings = self.settings
        failures = [failure for sidecar in sidecars for failure in sidecar.failures]
        lines = [json.dumps(failure.model_dump(), ensure_ascii=False) for failure in failures]
        write_text_atomically(self.folder / FAILURES_FILE, "".join(line + "\n" for line in lines))
        frames = settings.decode.frames
        manifest = CorpusManifest(
            format_version=FORMAT_VERSION,
            grid=(settings.grid_side, settings.grid_side, frames),
            frames_per_second=None if frames == 1 else settings.decode.frames_per_second,
            codebook_size=settings.codebook_size,
            text_vocabulary_size=settings.text_vocabulary_size,
            fingerprints=settings.fingerprints,
            counts=Counts(
                items=sum(sidecar.items for sidecar in sidecars),
                captions=sum(sidecar.captions for sidecar in sidecars),
                failed=len(failures),
            ),
            shards=tuple(sidecar.entry() for sidecar in sidecars if sidecar.items),
        )
        write_settings(self.folder / CORPUS_FILE, manifest)
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


def _difference(written: CorpusSettings, asked: CorpusSettings) -> str:
    """The first setting that differs, in words; empty where none does."""
    if written.manifest_sha256 != asked.manifest_sha256:
        return "another content of the manifest"
    if written.fingerprints.vqgan != asked.fingerprints.vqgan:
        return "another VQ-GAN"
    if written.fingerprints.bpe != asked.fingerprints.bpe:
        return "another BPE"
    before, now = _flat(written), _flat(asked)
    for name, value in now.items():
        if before.get(name) != value:
            return f"{name} = {before.get(name)}, and now it is {value}"
    return ""


def _flat(settings: CorpusSettings) -> dict[str, object]:
    tree = settings.model_dump(mode="json")
    return {**tree.pop("decode"), **tree}
