"""Reading a token corpus: items by number, straight from memory-mapped shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nuwa.data.shards import (
    ITEMS,
    TEXT,
    TOKEN_DTYPE,
    VISUAL,
    CorpusManifest,
    Group,
    Member,
    ShardEntry,
    Sidecar,
    read_manifest,
    read_sidecar,
)
from megatron_nuwa.data.text import TEXT_TOKENS
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid


@dataclass(frozen=True)
class _GroupView:
    """A group's arrays, mapped, and its metadata lines; `first_captions` has one entry more."""

    visual: np.ndarray
    text: np.ndarray
    lines: list[bytes]
    first_captions: np.ndarray


class Corpus:
    """The items of a finished corpus, numbered 0 to len − 1 in the manifest's order.

    Raises `UserError` naming the file where the corpus is missing, foreign or half-written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: CorpusManifest = read_manifest(self.path)
        try:
            self.grid = Grid.of(self.manifest.grid)
        except ValueError as error:
            raise UserError(f"corpus {self.path}: {error}") from error
        self._groups: list[tuple[Path, Group]] = []
        for entry in self.manifest.shards:
            sidecar = read_sidecar(self.path / f"{entry.name}.json")
            tar = self.path / f"{entry.name}.tar"
            check_shard(tar, entry, sidecar, self.grid)
            self._groups += [(tar, group) for group in sidecar.groups]
        self._starts = np.cumsum([0, *(group.items for _, group in self._groups)])
        if len(self) != self.manifest.counts.items:
            raise UserError(
                f"corpus {self.path} counts {self.manifest.counts.items} items, "
                f"but its shards hold {len(self)}"
            )
        self._maps: dict[Path, np.ndarray] = {}
        self._views: dict[int, _GroupView] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files itself; pickled maps would carry the corpus along.
        return {**self.__dict__, "_maps": {}, "_views": {}}

    def visual(self, index: int) -> np.ndarray:
        """An item's visual tokens in generation order: read-only uint16 (h·w·s,)."""
        view, row = self._locate(index)
        return view.visual[row]

    def texts(self, index: int) -> np.ndarray:
        """The tokens of all captions of an item: read-only uint16 (captions, 77)."""
        view, row = self._locate(index)
        return view.text[view.first_captions[row] : view.first_captions[row + 1]]

    def item(self, index: int) -> dict[str, Any]:
        """An item's metadata: id, captions, first_caption, frames, media, start, end."""
        view, row = self._locate(index)
        line: dict[str, Any] = json.loads(view.lines[row])
        return line

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Group by group: visual tokens (items, h·w·s) and text tokens (captions, 77), uint16."""
        for number in range(len(self._groups)):
            view = self._view(number)
            yield view.visual, view.text

    def visual_counts(self) -> np.ndarray:
        """How often each code occurs in the whole corpus: int64 (codebook_size,)."""
        counts = np.zeros(self.manifest.codebook_size, np.int64)
        for visual, _ in self.groups():
            found = np.bincount(visual.ravel(), minlength=len(counts))
            if len(found) > len(counts):
                raise UserError(
                    f"corpus {self.path} holds the visual token {len(found) - 1}, and its "
                    f"codebook has {len(counts)} codes"
                )
            counts += found
        return counts

    def _locate(self, index: int) -> tuple[_GroupView, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0 to {len(self) - 1}, not {index}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._view(number), int(index - self._starts[number])

    def _view(self, number: int) -> _GroupView:
        view = self._views.get(number)
        if view is None:
            tar, group = self._groups[number]
            view = self._views[number] = self._open(tar, group)
        return view

    def _open(self, tar: Path, group: Group) -> _GroupView:
        mapped = self._maps.get(tar)
        if mapped is None:
            mapped = self._maps[tar] = np.memmap(tar, np.uint8, mode="r")
        member = group.members[ITEMS]
        lines = mapped[member.offset : member.offset + member.size].tobytes().splitlines()
        try:
            first_captions = [int(json.loads(line)["first_caption"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{tar}: member {group.key}.{ITEMS} is not what was written") from error
        bounds = np.array([*first_captions, group.captions])
        if len(lines) != group.items or bounds[0] != 0 or (np.diff(bounds) < 1).any():
            raise UserError(f"{tar}: member {group.key}.{ITEMS} does not match the sidecar")
        return _GroupView(
            _mapped_array(mapped, group.members[VISUAL]),
            _mapped_array(mapped, group.members[TEXT]),
            lines,
            bounds,
        )


def check_shard(tar: Path, entry: ShardEntry, sidecar: Sidecar, grid: Grid) -> None:
    """Hold a shard's `corpus.json` entry, sidecar and file size against each other.

    Raises `UserError` naming the file that does not fit.
    """
    sidecar_file = tar.with_suffix(".json")
    if sidecar.entry() != entry:
        raise UserError(f"{sidecar_file} does not match the entry of {entry.name} in corpus.json")
    if not tar.is_file():
        raise UserError(f"{tar} is missing")
    if tar.stat().st_size != entry.bytes:
        raise UserError(f"{tar} has {tar.stat().st_size} bytes, and {entry.bytes} were written")
    for group in sidecar.groups:
        shapes = {VISUAL: (group.items, grid.cells), TEXT: (group.captions, TEXT_TOKENS)}
        for name in (VISUAL, TEXT, ITEMS):
            member = group.members.get(name)
            if member is None or not _fits(member, shapes.get(name), entry.bytes):
                raise UserError(f"{sidecar_file}: member {group.key}.{name} is wrong or missing")
    for field in ("items", "captions"):
        if sum(getattr(group, field) for group in sidecar.groups) != getattr(sidecar, field):
            raise UserError(f"{sidecar_file}: the groups' {field} do not add up")


def _fits(member: Member, shape: tuple[int, int] | None, tar_bytes: int) -> bool:
    if member.offset + member.size > tar_bytes or member.shape != shape:
        return False
    if shape is None:
        return True
    return member.dtype == TOKEN_DTYPE.str and member.size == shape[0] * shape[1] * 2


def _mapped_array(mapped: np.ndarray, member: Member) -> np.ndarray:
    flat = mapped[member.offset : member.offset + member.size].view(np.ndarray)
    return flat.view(TOKEN_DTYPE).reshape(member.shape)
