"""Media with sidecar files of the same name: what belongs together in tars and folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_nuwa.decoders import CLIP_SUFFIXES, IMAGE_SUFFIXES
from megatron_nuwa.errors import UserError
from preprocessing.sources.items import Media, SourceItem
from preprocessing.sources.rows import item_of_row

SKETCHES = (".sketch.png", ".sketch.npy")
CAPTIONS = (".txt", ".json")
MEDIA = (*IMAGE_SUFFIXES, *CLIP_SUFFIXES)


def key_of(name: str) -> tuple[str, str]:
    """The name up to the first dot of its last part, which is webdataset's key, and the rest."""
    folder, slash, last = name.rpartition("/")
    stem, dot, rest = last.partition(".")
    return folder + slash + stem, dot + rest


def sample_item(
    name: str, media: Media, sketch: Media | None, sidecars: Mapping[str, bytes], where: str
) -> SourceItem:
    """The item of a medium and its sidecars: `.txt` (a caption a line) and `.json`.

    The `.json` is an object with `caption` or `captions` and, if wanted, `start`, `end` and
    `provenance`; its captions go before those of the `.txt`. Raises `UserError` that begins with
    `where`.
    """
    row = _object(sidecars[".json"], where) if ".json" in sidecars else {}
    captions = row.get("captions", row.get("caption"))
    if captions is None and ".txt" in sidecars:
        lines = _text(sidecars[".txt"], f"{where}.txt").splitlines()
        captions = [line.strip() for line in lines if line.strip()]
    checked = item_of_row(
        {
            "id": name,
            # Only the captions and times are to be checked here: media are no texts in a tar.
            "media": name,
            "captions": captions or [],
            "start": row.get("start"),
            "end": row.get("end"),
            "provenance": row.get("provenance"),
        },
        "",
        f"{where}.json",
    )
    return replace(checked, media=media, sketch=sketch)


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(_text(content, f"{where}.json"))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}.json: not valid JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}.json: must be a JSON object such as " + '{"caption": …}')
    return row


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text") from error
