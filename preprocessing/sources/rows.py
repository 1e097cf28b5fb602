"""Rows of manifests and sidecars to items, strictly."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from megatron_nuwa.errors import UserError
from preprocessing.sources.items import SourceItem
from preprocessing.sources.locations import Location, join

FIELDS = ("id", "media", "captions", "start", "end", "sketch", "provenance")


def item_of_row(row: Mapping[str, Any], folder: Location, where: str) -> SourceItem:
    """The item of a manifest's row; `UserError` begins with `where` and names the field."""
    for name in ("id", "media", "captions"):
        if row.get(name) is None:
            near = difflib.get_close_matches(name, [str(key) for key in row], n=1, cutoff=0.7)
            hint = f" (is '{near[0]}' meant?)" if near and near[0] != name else ""
            raise UserError(f"{where}: the field '{name}' is missing{hint}")
    start, end = (_seconds(row.get(name), name, where) for name in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: the field 'end' must be later than 'start'")
    sketch = row.get("sketch")
    captions = _captions(row["captions"], where)
    return SourceItem(
        id=_identifier(row["id"], where),
        media=join(folder, _text(row["media"], "media", where)),
        captions=captions,
        start=start,
        end=end,
        sketch=None if sketch is None else join(folder, _text(sketch, "sketch", where)),
        provenance=_provenance(row.get("provenance"), len(captions), where),
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


def _provenance(value: Any, captions: int, where: str) -> tuple[str | None, ...] | None:
    """One writer for all captions, or a list with one for each; null where nobody knows."""
    if value is None:
        return None
    writers = [value] * captions if isinstance(value, str) else value
    if (
        not isinstance(writers, list)
        or len(writers) != captions
        or not all(
            writer is None or (isinstance(writer, str) and writer.strip()) for writer in writers
        )
    ):
        raise UserError(
            f"{where}: the field 'provenance' must be \"original\" or a model's name, or a list "
            f"with one of these or null for each of the {captions} captions, not {value!r}"
        )
    return tuple(writers)


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
