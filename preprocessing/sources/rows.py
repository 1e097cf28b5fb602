"""Rows of manifests and sidecars to items, strictly."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_nuwa.errors import UserError
from preprocessing.sources.items import SourceItem
from preprocessing.sources.locations import Location, join

FIELDS = ("id", "media", "captions", "start", "end", "sketch", "provenance", "shot")

_REQUIRED = FIELDS[:3]
_SURROGATE = re.compile("[\ud800-\udfff]")


def item_of_row(row: Mapping[str, Any], folder: Location, where: str) -> SourceItem:
    """The item of a manifest's row; `UserError` begins with `where` and names the field."""
    item = check_row(row, where)
    sketch = row.get("sketch")
    return SourceItem(
        id=item.id,
        media=join(folder, row["media"]),
        captions=item.captions,
        start=item.start,
        end=item.end,
        sketch=None if sketch is None else join(folder, sketch),
        provenance=item.provenance,
        shot=_shot(row.get("shot"), item.id),
    )


class CheckedRow(NamedTuple):
    """What a good row says, without the places of its media."""

    id: str
    captions: tuple[str, ...]
    start: float | None
    end: float | None
    provenance: tuple[str | None, ...] | None


def check_row(row: Mapping[str, Any], where: str) -> CheckedRow:
    """Whether a row is good, for less than its item costs; `UserError` as of `item_of_row`."""
    for name in _REQUIRED:
        if row.get(name) is None:
            near = difflib.get_close_matches(name, [str(key) for key in row], n=1, cutoff=0.7)
            hint = f" (is '{near[0]}' meant?)" if near and near[0] != name else ""
            raise UserError(f"{where}: the field '{name}' is missing{hint}")
    start = _seconds(row.get("start"), "start", where)
    end = _seconds(row.get("end"), "end", where)
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: the field 'end' must be later than 'start'")
    captions = _captions(row["captions"], where)
    name = _identifier(row["id"], where)
    _text(row["media"], "media", where)
    if row.get("sketch") is not None:
        _text(row["sketch"], "sketch", where)
    provenance = _provenance(row.get("provenance"), len(captions), where)
    return CheckedRow(name, captions, start, end, provenance)


def _identifier(value: Any, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, "id", where)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{where}: the field '{field}' must be a non-empty text, not {value!r}")
    if not value.isascii() and _SURROGATE.search(value):
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


def _shot(value: Any, name: str) -> int | None:
    """The number that `shots` has given an item; no error where others mean another thing by it."""
    if value is None:
        return None
    number = str(value)
    # `shots` ends the item's id in it, too.
    is_given = name.endswith(f"#{number}") and number.isdecimal() and len(number) < 10
    return int(number) if is_given else None


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
