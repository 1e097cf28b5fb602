"""JSON-lines, CSV and parquet manifests, checked whole at first and then read row by row."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import numpy as np

from megatron_nuwa.errors import UserError
from megatron_nuwa.training.progress import track
from preprocessing.sources.items import Source, SourceItem, hash_of_id
from preprocessing.sources.locations import Location, RandomReader, open_binary, parent, readable
from preprocessing.sources.rows import FIELDS, check_row, item_of_row

T = TypeVar("T")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Manifest(Source):
    """A file whose rows are checked whole when the first of them, or their number, is asked for.

    Its fingerprint, the sha256 of its bytes, is to be had for much less. Where it `is_shown`, a
    person can follow how many rows have been checked.
    """

    def __init__(self, location: Location, is_shown: bool = False) -> None:
        super().__init__(array("Q"))
        self.folder = parent(location)
        self._location = location
        self._name = f"manifest {location}"
        self._is_shown = is_shown
        self._is_checked = False

    @property
    def fingerprint(self) -> str:
        """The sha256 of the file."""
        if not hasattr(self, "_fingerprint"):
            with readable(self._location, "manifest"), open_binary(self._location) as stream:
                self._fingerprint = _sha256(stream)
        return self._fingerprint

    def check(self) -> None:
        """Read all rows, once; `UserError` naming the first that will not do."""
        if self._is_checked:
            return
        self._check_rows()
        self._is_checked = True
        if not len(self):
            raise UserError(f"{self._name} holds no items")

    def __len__(self) -> int:
        self.check()
        return super().__len__()

    @abstractmethod
    def _check_rows(self) -> None:
        """Read all rows, note their hashes and places, and the fingerprint."""

    def _followed(self, rows: Iterator[T], total: int | None = None) -> Iterator[T]:
        return track(rows, f"rows of {self._name}", total=total) if self._is_shown else rows

    def _changed(self) -> UserError:
        return UserError(f"{self._name} has changed while it was read; repeat the command")


class TextManifest(Manifest):
    """What JSON-lines and CSV have in common: a row is a piece of the file."""

    def __init__(self, location: Location, is_shown: bool = False) -> None:
        super().__init__(location, is_shown)
        self._reader = RandomReader(location)
        self._starts, self._sizes = array("q"), array("l")

    def _check_rows(self) -> None:
        for where, start, size, row in self._followed(self._read()):
            self._starts.append(start)
            self._sizes.append(size)
            self._id_hashes.append(hash_of_id(check_row(row, where).id))

    def __iter__(self) -> Iterator[SourceItem]:
        for where, _, _, row in self._read():
            yield item_of_row(row, self.folder, where)

    def _read(self) -> Iterator[tuple[str, int, int, Mapping[str, Any]]]:
        """What `_rows` says of the whole file; sets the fingerprint."""
        digest = hashlib.sha256()
        with readable(self._location, "manifest"), open_binary(self._location) as stream:
            yield from self._rows(_hashed(stream, digest))
        found = digest.hexdigest()
        if getattr(self, "_fingerprint", found) != found:
            raise self._changed()
        self._fingerprint = found

    def item(self, row: int) -> SourceItem:
        """The item of a row."""
        self.check()
        content = self._reader.read(self._starts[row], self._sizes[row])
        where = f"{self._name}, item {row}"
        return item_of_row(self._parse(content.decode(), where), self.folder, where)

    @abstractmethod
    def _rows(self, lines: Iterator[bytes]) -> Iterator[tuple[str, int, int, Mapping[str, Any]]]:
        """Of every row: what an error calls it, its place and size in bytes, and itself."""

    @abstractmethod
    def _parse(self, text: str, where: str) -> Mapping[str, Any]:
        """The row that a text is."""


class JsonLinesManifest(TextManifest):
    """One JSON object a line."""

    def _rows(self, lines: Iterator[bytes]) -> Iterator[tuple[str, int, int, Mapping[str, Any]]]:
        start = 0
        for number, line in enumerate(lines, start=1):
            mark = len(_BYTE_ORDER_MARK) if start == 0 and line.startswith(_BYTE_ORDER_MARK) else 0
            text = line[mark:].decode()
            if text.strip():
                where = f"{self._name}, line {number}"
                yield where, start + mark, len(line) - mark, self._parse(text, where)
            start += len(line)

    def _parse(self, text: str, where: str) -> Mapping[str, Any]:
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be a JSON object such as " + '{"id": …}')
        return row


class CsvManifest(TextManifest):
    """A table with a header; a cell of captions is one text or a JSON list."""

    def _rows(self, lines: Iterator[bytes]) -> Iterator[tuple[str, int, int, Mapping[str, Any]]]:
        read = 0

        def texts() -> Iterator[str]:
            nonlocal read
            for line in lines:
                mark = (
                    len(_BYTE_ORDER_MARK) if not read and line.startswith(_BYTE_ORDER_MARK) else 0
                )
                read += len(line)
                yield line[mark:].decode()

        # A row may span lines, so its piece of the file is known once it is read.
        reader = csv.reader(texts(), strict=True)
        try:
            self._columns = next(reader, [])
            start = read
            for cells in reader:
                if cells:
                    where = f"{self._name}, line {reader.line_num}"
                    yield where, start, read - start, self._mapping(cells, where)
                start = read
        except csv.Error as error:
            raise UserError(f"{self._name}, line {reader.line_num}: {error}") from error

    def _parse(self, text: str, where: str) -> Mapping[str, Any]:
        cells = next(row for row in csv.reader(io.StringIO(text, newline="")) if row)
        return self._mapping(cells, where)

    def _mapping(self, cells: list[str], where: str) -> Mapping[str, Any]:
        if len(cells) > len(self._columns):
            raise UserError(f"{where}: has more values than the header has columns")
        # A CSV cell cannot say "absent" in any other way than by being empty.
        row: dict[str, Any] = {
            name: cell
            for name, cell in zip(self._columns, cells, strict=False)
            if cell or name not in FIELDS[3:]
        }
        for name in ("captions", "provenance"):
            if row.get(name) is not None:
                row[name] = _csv_list(row[name], name, where)
        return row


class ParquetManifest(Manifest):
    """A parquet file, one row group of which is held at a time."""

    def __init__(self, location: Location, is_shown: bool = False) -> None:
        super().__init__(location, is_shown)
        self._group: tuple[int, Any] = (-1, None)

    def _check_rows(self) -> None:
        sizes: list[int] = []
        with _parquet(self._location, self._name) as file:
            rows = self._followed(self._rows(file, sizes), file.metadata.num_rows)
            for number, row in enumerate(rows):
                where = f"{self._name}, row {number}"
                self._id_hashes.append(hash_of_id(check_row(row, where).id))
        self._starts = np.cumsum([0, *sizes])

    def _rows(self, file: Any, sizes: list[int]) -> Iterator[dict[str, Any]]:
        """All rows; the sizes of their row groups are put into `sizes`."""
        for number in range(file.num_row_groups):
            table = self._table(file, number)
            sizes.append(table.num_rows)
            for batch in table.to_batches(max_chunksize=1024):
                yield from batch.to_pylist()

    def item(self, row: int) -> SourceItem:
        """The item of a row."""
        self.check()
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        held, table = self._group
        if held != number:
            with _parquet(self._location, self._name) as file:
                table = self._table(file, number)
            self._group = (number, table)
        place = row - int(self._starts[number])
        where = f"{self._name}, row {row}"
        return item_of_row(table.slice(place, 1).to_pylist()[0], self.folder, where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": (-1, None)}

    def _table(self, file: Any, number: int) -> Any:
        columns = [name for name in file.schema_arrow.names if name in FIELDS]
        return file.read_row_group(number, columns=columns)


@contextmanager
def _parquet(location: Location, name: str) -> Iterator[Any]:
    """Open a parquet file; `UserError` where pyarrow is absent or the file is none."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{name} needs pyarrow: pip install 'megatron-nuwa[parquet]'") from error
    with readable(location, "manifest"), open_binary(location) as stream:
        try:
            yield pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowException as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{name} is not a readable parquet file: {reason}") from error


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _hashed(stream: Any, digest: Any) -> Iterator[bytes]:
    for line in stream:
        digest.update(line)
        yield line


def _csv_list(cell: str, field: str, where: str) -> Any:
    """What a CSV cell says of the captions: a JSON list, or one plain text."""
    if not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: the field '{field}' starts like a JSON list but is none ({error.msg})"
        ) from error
