"""Manifests: which media files there are, and what is said about them."""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nuwa.errors import UserError

FIELDS = ("id", "media", "captions", "start", "end", "sketch")


@dataclass(frozen=True)
class SourceItem:
    """One image, or one clip from `start` to `end` seconds of a video, with its captions."""

    id: str
    media: Path
    captions: tuple[str, ...]
    start: float | None = None
    end: float | None = None
    sketch: Path | None = None


def read_manifest(path: str | Path) -> list[SourceItem]:
    """Read a JSON-lines, CSV or parquet manifest; media paths are relative to its folder.

    Empty captions, repeated ids and absent media are left for the farm, which records them item by
    item. Raises `UserError` naming the file, the line (parquet: the row) and the field.
    """
    path = Path(path)
    readers = {
        ".jsonl": _json_rows,
        ".ndjson": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"manifest {path} must end in .jsonl, .csv or .parquet")
    if not path.is_file():
        raise UserError(f"manifest {path} does not exist")
    try:
        items = [_item(row, path.parent, where) for where, row in reader(path)]
    except UnicodeDecodeError as error:
        raise UserError(f"manifest {path} is not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"manifest {path} cannot be read: {error.strerror or error}") from error
    if not items:
        raise UserError(f"manifest {path} holds no items")
    return items


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"manifest {path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: must be a JSON object such as " + '{"id": …}')
            yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                where = f"manifest {path}, line {reader.line_num}"
                if None in row:
                    raise UserError(f"{where}: has more values than the header has columns")
                # A CSV cell cannot say "absent" in any other way than by being empty.
                row = {key: value for key, value in row.items() if value or key not in FIELDS[3:]}
                if row.get("captions") is not None:
                    row["captions"] = _csv_captions(row["captions"], where)
                yield where, row
        except csv.Error as error:
            raise UserError(f"manifest {path}, line {reader.line_num}: {error}") from error


def _csv_captions(cell: str, where: str) -> Any:
    """Captions of a CSV cell: a JSON list of strings, or one plain caption."""
    if not cell.lstrip().startswith("["):
        return [cell]
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: the field 'captions' starts like a JSON list but is none ({error.msg})"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"manifest {path} needs pyarrow: pip install 'megatron-nuwa[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in FIELDS]
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield f"manifest {path}, row {number}", row
                    number += 1
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"manifest {path} is not a readable parquet file: {reason}") from error


def _item(row: Mapping[str, Any], folder: Path, where: str) -> SourceItem:
    for name in ("id", "media", "captions"):
        if row.get(name) is None:
            near = difflib.get_close_matches(name, [str(key) for key in row], n=1, cutoff=0.7)
            hint = f" (is '{near[0]}' meant?)" if near and near[0] != name else ""
            raise UserError(f"{where}: the field '{name}' is missing{hint}")
    start, end = (_seconds(row.get(name), name, where) for name in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: the field 'end' must be later than 'start'")
    sketch = row.get("sketch")
    return SourceItem(
        id=_identifier(row["id"], where),
        media=folder / _text(row["media"], "media", where),
        captions=_captions(row["captions"], where),
        start=start,
        end=end,
        sketch=None if sketch is None else folder / _text(sketch, "sketch", where),
    )


def _identifier(value: Any, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, "id", where)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{where}: the field '{field}' must be a non-empty text, not {value!r}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}: the field '{field}' is not valid Unicode text: {value!r}")
    return value


def _captions(value: Any, where: str) -> tuple[str, ...]:
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise UserError(f"{where}: the field 'captions' must be a text or a list of texts")
    return tuple(captions)


def _seconds(value: Any, field: str, where: str) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise UserError(
            f"{where}: the field '{field}' must be a time in seconds of 0 or more, not {value!r}"
        )
    return seconds
