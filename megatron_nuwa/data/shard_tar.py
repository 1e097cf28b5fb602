"""A shard's tar: packed groups of items, and where in it each array lies."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from pydantic import Field

from megatron_nuwa.config import Settings
from megatron_nuwa.data.text import TEXT_TOKENS

GROUP_ITEMS = 1024
TOKEN_DTYPE = np.dtype("<u2")
VISUAL, TEXT, SKETCH, ITEMS = "visual.npy", "text.npy", "sketch.npy", "items.jsonl"


class Member(Settings):
    """Where in the tar a member's content lies; for an array, where its numbers lie."""

    offset: int = Field(ge=0)
    size: int = Field(ge=0)
    dtype: str | None = None
    shape: tuple[int, int] | None = None


class Group(Settings):
    """One webdataset sample: up to 1,024 packed items."""

    key: str
    items: int = Field(ge=1)
    captions: int = Field(ge=1)
    members: dict[str, Member]


@dataclass(frozen=True)
class ShardItem:
    """One tokenized item: `visual` (h·w·s,) in generation order, `text` (captions, 77), uint16.

    `sketch`, like `visual`, are tokens of VQ-GAN-Seg; all items of a corpus have them or none.
    `frames` counts the real ones, without padding; `start` and `end` are seconds of the media.
    `provenance` says of each caption who wrote it: "original", the name of a captioning model, or
    None where nobody knows; it is None as a whole where the manifest says nothing.
    `perceptual_hashes`, 64 bits in hex, are kept where near-duplicates are looked for.
    `frames_per_second` is there where the frames were taken at another rate than the corpus's.
    """

    id: str
    visual: np.ndarray
    text: np.ndarray
    captions: tuple[str, ...]
    frames: int
    media: str
    start: float | None = None
    end: float | None = None
    provenance: tuple[str | None, ...] | None = None
    perceptual_hashes: tuple[str, ...] | None = None
    sketch: np.ndarray | None = None
    frames_per_second: float | None = None


def check_item(item: ShardItem, first: ShardItem) -> None:
    """`ValueError` naming the field that is wrong, also beside the shard's first item."""
    visual_shape = first.visual.shape
    if item.visual.dtype != np.uint16 or item.visual.ndim != 1 or item.visual.shape != visual_shape:
        raise ValueError(
            f"visual of item {item.id!r} must be uint16 {visual_shape}, "
            f"not {item.visual.dtype} {item.visual.shape}"
        )
    if (item.sketch is None) != (first.sketch is None):
        raise ValueError(f"items {first.id!r} and {item.id!r} must both have a sketch or neither")
    if item.sketch is not None and (
        item.sketch.dtype != np.uint16 or item.sketch.shape != visual_shape
    ):
        raise ValueError(
            f"sketch of item {item.id!r} must be uint16 {visual_shape}, "
            f"not {item.sketch.dtype} {item.sketch.shape}"
        )
    text_shape = (len(item.captions), TEXT_TOKENS)
    if not item.captions or item.text.dtype != np.uint16 or item.text.shape != text_shape:
        raise ValueError(
            f"text of item {item.id!r} must be uint16 {text_shape} with at least one caption, "
            f"not {item.text.dtype} {item.text.shape}"
        )
    if item.provenance is not None and len(item.provenance) != len(item.captions):
        raise ValueError(
            f"provenance of item {item.id!r} must have one entry a caption, "
            f"{len(item.captions)}, not {len(item.provenance)}"
        )


def write_tar(stream: IO[bytes], items: Sequence[ShardItem], group_items: int) -> list[Group]:
    """Write items, up to `group_items` a group; the same items give the same bytes."""
    groups: list[Group] = []
    # USTAR headers of fixed owner, time and mode: nothing in the file tells when or by whom.
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for start in range(0, len(items), group_items):
            group = items[start : start + group_items]
            key = f"{len(groups):06d}"
            members = {
                VISUAL: _add_array(tar, f"{key}.{VISUAL}", [item.visual[None] for item in group]),
                TEXT: _add_array(tar, f"{key}.{TEXT}", [item.text for item in group]),
            }
            sketches = [item.sketch[None] for item in group if item.sketch is not None]
            if sketches:
                members[SKETCH] = _add_array(tar, f"{key}.{SKETCH}", sketches)
            members[ITEMS] = _add_member(tar, f"{key}.{ITEMS}", _item_lines(group))
            captions = sum(len(item.captions) for item in group)
            groups.append(Group(key=key, items=len(group), captions=captions, members=members))
    return groups


def _add_array(tar: tarfile.TarFile, name: str, rows: list[np.ndarray]) -> Member:
    array = np.ascontiguousarray(np.concatenate(rows), dtype=TOKEN_DTYPE)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    member = _add_member(tar, name, buffer.getvalue())
    header = member.size - array.nbytes
    return Member(
        offset=member.offset + header,
        size=array.nbytes,
        dtype=TOKEN_DTYPE.str,
        shape=(array.shape[0], array.shape[1]),
    )


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> Member:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = len(content), 0, 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(header, io.BytesIO(content))
    return Member(offset=offset, size=len(content))


def _item_lines(group: Sequence[ShardItem]) -> bytes:
    lines = []
    first_caption = 0
    for item in group:
        line: dict[str, Any] = {
            "id": item.id,
            "captions": list(item.captions),
            "first_caption": first_caption,
            "frames": item.frames,
            "media": item.media,
            "start": item.start,
            "end": item.end,
        }
        if item.provenance is not None:
            line["provenance"] = list(item.provenance)
        if item.perceptual_hashes is not None:
            line["perceptual_hashes"] = list(item.perceptual_hashes)
        if item.frames_per_second is not None:
            line["frames_per_second"] = item.frames_per_second
        # ASCII only: some readers would split a line at Unicode's other line separators.
        lines.append(json.dumps(line) + "\n")
        first_caption += len(item.captions)
    return "".join(lines).encode()
