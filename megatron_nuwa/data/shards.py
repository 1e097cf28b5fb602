"""The corpus on disk: its files' fields, and how a shard is written.

A corpus is a folder with `corpus.json`, and for each shard a plain webdataset tar of packed groups
and a JSON sidecar that says where in the tar each array lies. The same items give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)

from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.data.shard_list import (
    SHARD_DIGITS,
    ShardEntry,
    ShardList,
    laid_out,
    with_shards,
)
from megatron_nuwa.data.shard_tar import (
    GROUP_ITEMS,
    SKETCH,
    TEXT,
    VISUAL,
    Group,
    ShardItem,
    check_item,
    write_tar,
)
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sha256_of, write_text_atomically, written_atomically

FORMAT_VERSION = 1
CORPUS_FILE = "corpus.json"


class Fingerprints(Settings):
    """sha256 of what the tokens depend on: VQ-GAN, BPE and decode settings.

    `sketch` is that of VQ-GAN-Seg, in corpora whose items have sketches.
    """

    vqgan: str
    bpe: str
    decode: str
    sketch: str | None = None

    @model_serializer(mode="wrap")
    def _as_ever(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_absent(plain(self), "sketch")


class Counts(Settings):
    """Items and captions in the corpus, items of the manifest that failed, and those left out.

    `left_out` counts by the name of the filter.
    """

    items: int = Field(ge=1)
    captions: int = Field(ge=1)
    failed: int = Field(ge=0)
    left_out: dict[str, int] = Field(default_factory=dict)


class CorpusManifest(Settings):
    """`corpus.json`, the last file of a corpus to appear and so its commit.

    `files` has the sha256 of the corpus's other files, `sha256` the one of this file without its
    own last field; corpora of the first releases have neither.
    """

    format_version: int
    grid: tuple[int, int, int]
    frames_per_second: float | None
    codebook_size: int = Field(ge=1, le=1 << 16)
    # Codes of VQ-GAN-Seg; null where the items have no sketches.
    sketch_codebook_size: int | None = Field(None, ge=1, le=1 << 16)
    text_vocabulary_size: int = Field(ge=1, le=1 << 16)
    fingerprints: Fingerprints
    counts: Counts
    shards: Annotated[
        Sequence[ShardEntry], WrapValidator(ShardList.validated), PlainSerializer(list)
    ]
    files: dict[str, str] = Field(default_factory=dict)
    sha256: str | None = None

    @property
    def has_sketches(self) -> bool:
        """Whether every item has a sketch; if not, none has."""
        return self.sketch_codebook_size is not None

    @property
    def arrays(self) -> dict[str, int]:
        """The token arrays of a group by their names, and how many tokens each one's kind has."""
        found = {VISUAL: self.codebook_size, TEXT: self.text_vocabulary_size}
        if self.sketch_codebook_size is not None:
            found[SKETCH] = self.sketch_codebook_size
        return found

    @model_serializer(mode="wrap")
    def _as_ever(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_absent(plain(self), "sketch_codebook_size")

    def sealed(self) -> CorpusManifest:
        """The manifest with the checksum of all its other fields."""
        unsealed = self.model_copy(update={"sha256": None})
        return self.model_copy(update={"sha256": _sha256(_manifest_text(unsealed))})

    def fingerprint(self) -> str:
        """Of what the corpus holds, wherever it lies: the SHA-256 of `model_dump_json()`."""
        shell = self.model_copy(update={"shards": ()}).model_dump_json().encode()
        head, empty, tail = shell.partition(b'"shards":[]')
        # Entries hold no spaces but those of their layout.
        entries = (piece.translate(None, b" \n") for piece in ShardList.of(self.shards).text())
        return _sha256(chain([head, empty[:-1]], entries, [b"]", tail]))


class Duplicate(Settings):
    """What is kept of an item that looks like another one, so that it need not be decoded again.

    `place` counts the items of its shard that were encoded before it.
    """

    place: int = Field(ge=0)
    perceptual_hashes: tuple[str, ...]


class Failure(Settings):
    """An item of the manifest that is not in the corpus, and why.

    `filter` names the filter that left it out; an item that failed has none.
    """

    id: str
    reason: str
    filter: str | None = None
    duplicate: Duplicate | None = None


class Sidecar(Settings):
    """`shard-NNNNNN.json`, which commits one shard; without items there is no tar."""

    shard: str
    items: int = Field(ge=0)
    captions: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str
    groups: tuple[Group, ...]
    failures: tuple[Failure, ...]

    def entry(self) -> ShardEntry:
        """This shard's line in `corpus.json`."""
        return ShardEntry(
            name=self.shard,
            items=self.items,
            captions=self.captions,
            bytes=self.bytes,
            sha256=self.sha256,
            sidecar_sha256=hashlib.sha256(settings_text(self).encode()).hexdigest(),
        )


def shard_name(number: int) -> str:
    """`shard-000007` for 7."""
    return f"shard-{number:0{SHARD_DIGITS}d}"


def write_shard(
    folder: Path,
    number: int,
    items: Sequence[ShardItem],
    failures: Sequence[Failure] = (),
    group_items: int = GROUP_ITEMS,
) -> Sidecar:
    """Write one shard's tar and then its sidecar, each by write → fsync → rename.

    Raises `ValueError` naming the item and field whose shape or type is wrong.
    """
    if group_items < 1:
        raise ValueError(f"group_items must be at least 1, not {group_items}")
    for item in items:
        check_item(item, items[0])
    name = shard_name(number)
    tar = folder / f"{name}.tar"
    groups: list[Group] = []
    size, digest = 0, hashlib.sha256().hexdigest()
    if items:
        with written_atomically(tar) as stream:
            groups = write_tar(stream, items, group_items)
        size, digest = tar.stat().st_size, sha256_of(tar)
    else:
        tar.unlink(missing_ok=True)
    sidecar = Sidecar(
        shard=name,
        items=len(items),
        captions=sum(len(item.captions) for item in items),
        bytes=size,
        sha256=digest,
        groups=tuple(groups),
        failures=tuple(failures),
    )
    write_settings(folder / f"{name}.json", sidecar)
    return sidecar


def settings_text(settings: Settings) -> str:
    """The one way in which these settings are written down."""
    return _json_text(settings.model_dump(mode="json", exclude_none=True))


def _manifest_text(manifest: CorpusManifest) -> Iterator[bytes | memoryview]:
    """What is written of a manifest, piece by piece: it lists up to a million shards."""
    without = manifest.model_copy(update={"shards": ()}).model_dump(mode="json")
    return with_shards(_json_text(without).encode(), ShardList.of(manifest.shards).text())


def is_intact(content: bytes) -> bool:
    """Whether every byte of a `corpus.json` is as it was written; true where it has no seal.

    It goes by the file's own fields, so that a corpus stays intact when this program learns more.
    """
    parts = laid_out(content)
    shell = content if parts is None else parts.shell
    tree = parse_json(shell, CORPUS_FILE)
    if tree.get("sha256") is None:
        return True
    unsealed = [_json_text({**tree, "sha256": None}).encode()]
    sealed = unsealed if parts is None else with_shards(unsealed[0], [parts.text])
    return tree["sha256"] == _sha256(sealed) and shell == _json_text(tree).encode()


def _sha256(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _without_absent(tree: dict[str, Any], field: str) -> dict[str, Any]:
    """A tree without a field that is null: what has no sketches reads as it did before them."""
    return {name: value for name, value in tree.items() if name != field or value is not None}


def _json_text(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def write_settings(path: Path, settings: Settings) -> None:
    """Write one of the corpus's JSON files atomically; a manifest gets its seal."""
    if not isinstance(settings, CorpusManifest):
        write_text_atomically(path, settings_text(settings))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as stream:
        stream.writelines(_manifest_text(settings.sealed()))


def commit_corpus(folder: Path, manifest: CorpusManifest, files: Sequence[str]) -> CorpusManifest:
    """Write `corpus.json` with the checksums of the folder's other files; returns what it says.

    `files` names those that belong to the corpus beside its shards; absent ones are left out.
    """
    present = [name for name in files if (folder / name).is_file()]
    sums = {name: sha256_of(folder / name) for name in sorted(present)}
    manifest = manifest.model_copy(update={"files": sums})
    write_settings(folder / CORPUS_FILE, manifest)
    return manifest.sealed()


def read_manifest(folder: Path) -> CorpusManifest:
    """Read `corpus.json`; `UserError` where it is missing or not one of ours."""
    path = folder / CORPUS_FILE
    if not path.is_file():
        raise UserError(f"corpus {folder} is missing or unfinished: it has no {CORPUS_FILE}")
    return parse_manifest(_read(path), str(path))


def parse_manifest(content: bytes, origin: str) -> CorpusManifest:
    """`corpus.json` from its bytes; `UserError` naming `origin` where it is not one of ours."""
    parts = laid_out(content)
    tree = parse_json(content if parts is None else parts.shell, origin)
    if parts is not None:
        tree["shards"] = parts.shards
    version = tree.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{origin} has format_version {version!r}, and this program reads {FORMAT_VERSION}"
        )
    return parse_settings(CorpusManifest, tree, origin)


def read_sidecar(path: Path) -> Sidecar:
    """Read a shard's sidecar; `UserError` where it is missing or not one of ours."""
    return parse_settings(Sidecar, read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `UserError` naming the file where there is none."""
    return parse_json(_read(path), str(path))


def parse_json(content: bytes, origin: str) -> dict[str, Any]:
    """A JSON object from bytes; `UserError` naming `origin` where there is none."""
    try:
        tree = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is not valid JSON") from error
    if not isinstance(tree, dict):
        raise UserError(f"{origin} must hold a JSON object")
    return tree


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
