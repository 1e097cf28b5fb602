"""The shards that `corpus.json` lists, as columns: a million of them take some 90 MB."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from pydantic import Field, ValidatorFunctionWrapHandler

from megatron_nuwa.config import Settings

# Shards have names of so many digits.
SHARD_DIGITS = 6
MOST_SHARDS = 10**SHARD_DIGITS
_SHA256 = r"^[0-9a-f]{64}$"
# What a column of int64 holds, with room for sums.
_MOST = 10**18 - 1
# Bytes of `corpus.json` that are taken apart at a time.
_BLOCK = 1 << 20
# Entries of it that are put together at a time.
_ROWS = 4096

# How `corpus.json` has always been laid out; others are read too, with more memory.
_BEGIN, _END = b'\n "shards": [\n', b"\n ]"
_EMPTY = b'\n "shards": []'
_NEXT = b",\n  {"
_ENTRY = (
    b'  {\n   "name": "shard-%b",\n   "items": %b,\n   "captions": %b,\n   "bytes": %b,\n'
    b'   "sha256": "%b",\n   "sidecar_sha256": %b\n  }'
)
_NUMBER = rb"[1-9][0-9]{0,17}"
_PATTERN = re.compile(
    re.escape(_ENTRY)
    % (
        rb"([0-9]{%d})" % SHARD_DIGITS,
        rb"(%b)" % _NUMBER,
        rb"(%b)" % _NUMBER,
        rb"(0|%b)" % _NUMBER,
        rb"([0-9a-f]{64})",
        rb'("[0-9a-f]{64}"|null)',
    )
)


class ShardEntry(Settings):
    """One shard in `corpus.json`; `bytes` and `sha256` are those of its tar.

    `sidecar_sha256` is that of its sidecar's bytes; corpora of the first releases have none.
    """

    name: str = Field(pattern=rf"^shard-[0-9]{{{SHARD_DIGITS}}}$")
    items: int = Field(ge=1, le=_MOST)
    captions: int = Field(ge=1, le=_MOST)
    bytes: int = Field(ge=0, le=_MOST)
    sha256: str = Field(pattern=_SHA256)
    sidecar_sha256: str | None = Field(None, pattern=_SHA256)


class ShardList(Sequence[ShardEntry]):
    """Entries of `corpus.json`, of which only columns of numbers are held.

    `items` are those of each shard, int64 (shards,).
    """

    def __init__(
        self, numbers: np.ndarray, counts: np.ndarray, sums: np.ndarray, sealed: np.ndarray
    ) -> None:
        """`counts` int64 (3, shards): items, captions, bytes; `sums` uint8 (2, shards, 32).

        `sealed` bool (shards,) says whose sidecar has a checksum.
        """
        self._numbers, self._counts, self._sums, self._sealed = numbers, counts, sums, sealed

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> ShardList:
        """A list of entries, which may come one by one."""
        if isinstance(entries, ShardList):
            return entries
        numbers, sealed = array("I"), array("b")
        counts = [array("q") for _ in range(3)]
        sums = bytearray(), bytearray()
        for entry in entries:
            numbers.append(int(entry.name[-SHARD_DIGITS:]))
            for column, count in zip(
                counts, (entry.items, entry.captions, entry.bytes), strict=True
            ):
                column.append(count)
            sums[0].extend(bytes.fromhex(entry.sha256))
            sums[1].extend(bytes.fromhex(entry.sidecar_sha256 or "0" * 64))
            sealed.append(entry.sidecar_sha256 is not None)
        return cls(
            np.array(numbers, np.uint32),
            np.array(counts, np.int64).reshape(3, -1),
            np.array([np.frombuffer(each, np.uint8).reshape(-1, 32) for each in sums]),
            np.array(sealed, bool),
        )

    @classmethod
    def validated(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> ShardList:
        """For pydantic: what `handler` makes of the value, as columns."""
        return value if isinstance(value, cls) else cls.of(handler(value))

    def fill(self, start: int, rows: Sequence[tuple[bytes, ...]]) -> None:
        """Take over entries from `start` on: number, counts, checksum, other checksum or null."""
        numbers, *counts, sums, seals = zip(*rows, strict=True)
        part = slice(start, start + len(rows))
        own = (b'"%b"' % (b"0" * 64) if seal == b"null" else seal for seal in seals)
        self._numbers[part] = np.array(numbers).astype(np.uint32)
        self._counts[:, part] = np.array(counts).astype(np.int64)
        self._sums[0, part] = _digests(b"".join(sums).decode())
        self._sums[1, part] = _digests(b"".join(own).replace(b'"', b"").decode())
        self._sealed[part] = [seal != b"null" for seal in seals]

    @property
    def items(self) -> np.ndarray:
        """Items of each shard."""
        return self._counts[0]

    def total(self, field: str) -> int:
        """Sum of `items`, `captions` or `bytes` over the shards."""
        return int(self._counts[("items", "captions", "bytes").index(field)].sum())

    def name(self, shard: int) -> str:
        """The name of a shard by its place in the list."""
        return f"shard-{self._numbers[shard]:0{SHARD_DIGITS}d}"

    def text(self) -> Iterator[bytes]:
        """The entries as `corpus.json` has them between its brackets, piece by piece."""
        for start in range(0, len(self), _ROWS):
            part = slice(start, start + _ROWS)
            numbers = (b"%0*d" % (SHARD_DIGITS, number) for number in self._numbers[part].tolist())
            counts = ([b"%d" % n for n in column] for column in self._counts[:, part].tolist())
            sums, seals = (_texts(column) for column in self._sums[:, part])
            sealed = self._sealed[part].tolist()
            seals = [
                b'"%b"' % seal if its else b"null" for seal, its in zip(seals, sealed, strict=True)
            ]
            rows = zip(numbers, *counts, sums, seals, strict=True)
            yield (b",\n" if start else b"") + b",\n".join(_ENTRY % row for row in rows)

    def _hex(self, column: int, shard: int) -> str:
        return self._sums[column, shard].tobytes().hex()

    def _entry(self, shard: int) -> ShardEntry:
        items, captions, size = self._counts[:, shard].tolist()
        # What a list holds has been checked.
        return ShardEntry.model_construct(
            name=self.name(shard),
            items=items,
            captions=captions,
            bytes=size,
            sha256=self._hex(0, shard),
            sidecar_sha256=self._hex(1, shard) if self._sealed[shard] else None,
        )

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, shard: int) -> ShardEntry: ...

    @overload
    def __getitem__(self, shard: slice) -> ShardList: ...

    def __getitem__(self, shard: int | slice) -> ShardEntry | ShardList:
        if isinstance(shard, slice):
            columns = self._numbers[shard], self._counts[:, shard]
            return ShardList(*columns, self._sums[:, shard], self._sealed[shard])
        if not -len(self) <= shard < len(self):
            raise IndexError(shard)
        return self._entry(shard)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardList):
            return NotImplemented
        mine, others = (
            (each._numbers, each._counts, each._sums, each._sealed) for each in (self, other)
        )
        return all(map(np.array_equal, mine, others))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ShardList of {len(self)} shards"


@dataclass(frozen=True)
class LaidOut:
    """A `corpus.json` in its usual layout: all but the entries, and these, parsed and as text."""

    shell: bytes
    shards: ShardList
    text: memoryview


def laid_out(content: bytes) -> LaidOut | None:
    """Take a `corpus.json` apart without making objects of its shards.

    None where it is laid out in another way, be it good or bad.
    """
    begin = content.find(_BEGIN) + len(_BEGIN)
    end = content.find(_END, begin)
    if begin < len(_BEGIN) or end < 0 or content.count(b'"shards"') != 1:
        return None
    count = content.count(_NEXT, begin, end) + 1
    # Made at once: many small parts would leave the process's memory in pieces.
    columns = ShardList(
        np.empty(count, np.uint32),
        np.empty((3, count), np.int64),
        np.empty((2, count, 32), np.uint8),
        np.empty(count, bool),
    )
    place, done = begin, 0
    while place < end:
        cut = end if end - place <= _BLOCK else content.rfind(_NEXT, place, place + _BLOCK)
        block = content[place : max(cut, place)]
        rows = _PATTERN.findall(block)
        # What the pattern has passed over is missing here.
        if not rows or b",\n".join(_ENTRY % row for row in rows) != block:
            return None
        columns.fill(done, rows)
        place, done = cut + 2, done + len(rows)
    shell = content[: begin - len(_BEGIN)] + _EMPTY + content[end + len(_END) :]
    return LaidOut(shell, columns, memoryview(content)[begin:end])


def with_shards(shell: bytes, text: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """A `corpus.json` with no shards, piece by piece with the entries put into it."""
    head, _, tail = shell.partition(_EMPTY)
    pieces = iter(text)
    first = next(pieces, None)
    if first is None:
        yield shell
        return
    yield head + _BEGIN
    yield first
    yield from pieces
    yield _END + tail


def _digests(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 32)


def _texts(digests: np.ndarray) -> list[bytes]:
    text = digests.tobytes().hex().encode()
    return [text[place : place + 64] for place in range(0, len(text), 64)]
