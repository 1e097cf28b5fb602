"""The one door to all kinds of sources."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron_nuwa.errors import UserError
from preprocessing.sources.folders import FolderSource
from preprocessing.sources.items import Source
from preprocessing.sources.locations import Location, file_system, locate, readable, suffix
from preprocessing.sources.manifests import (
    CsvManifest,
    JsonLinesManifest,
    Manifest,
    ParquetManifest,
)
from preprocessing.sources.tars import TarSource

MANIFESTS: dict[str, Callable[[Location, bool], Manifest]] = {
    ".jsonl": JsonLinesManifest,
    ".ndjson": JsonLinesManifest,
    ".csv": CsvManifest,
    ".parquet": ParquetManifest,
}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def read_source(name: str | Path, checked: bool = True, is_shown: bool = False) -> Source:
    """Items of a manifest, of tars (`x.tar`, `x-{000..041}.tar`, a folder of tars) or of a folder.

    A local path or any fsspec address. Empty captions, repeated ids and absent media are left for
    the farm, which records them item by item. Raises `UserError` naming the file and the place;
    of the rows of a manifest that is not `checked` only when they are asked for. Where it
    `is_shown`, a person can follow the reading, which of several processes one should ask for.
    """
    location = locate(name)
    if suffix(location) in MANIFESTS:
        return read_manifest(name, checked, is_shown)
    if suffix(location) == ".tar":
        return _with_items(TarSource(_expanded(location), is_shown), f"tar {location}")
    if not _is_folder(location):
        raise UserError(
            f"source {location} must be a folder, a .tar, or a manifest that ends in .jsonl, .csv "
            f"or .parquet"
        )
    tars = _tars_in(location)
    if tars:
        return _with_items(TarSource(tars, is_shown), f"folder {location}")
    return _with_items(FolderSource(location, is_shown), f"folder {location}")


def read_manifest(path: str | Path, checked: bool = True, is_shown: bool = False) -> Source:
    """Items of a JSON-lines, CSV or parquet manifest; media are named relative to its folder.

    Every row is checked now (where not `checked`, when the first is asked for) and read again when
    its item is asked for. Raises `UserError` naming the file, the line (parquet: the row) and the
    field.
    """
    location = locate(path)
    kind = MANIFESTS.get(suffix(location))
    if kind is None:
        raise UserError(f"manifest {path} must end in .jsonl, .csv or .parquet")
    if isinstance(location, Path) and not location.is_file():
        raise UserError(f"manifest {path} does not exist")
    manifest = kind(location, is_shown)
    if checked:
        manifest.check()
    return manifest


def _with_items(source: Source, what: str) -> Source:
    if not len(source):
        raise UserError(f"{what} holds no items")
    return source


def _expanded(location: Location) -> list[Location]:
    """The tars that a name with a range such as {000..041} stands for."""
    found = _RANGE.search(str(location))
    if found is None:
        return [location]
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise UserError(f"tar {location}: the range {found[0]} counts downwards")
    before, after = str(location)[: found.start()], str(location)[found.end() :]
    width = len(found[1])
    return [locate(f"{before}{number:0{width}d}{after}") for number in range(first, last + 1)]


def _is_folder(location: Location) -> bool:
    if isinstance(location, Path):
        return location.is_dir()
    with readable(location, "source"):
        system, path = file_system(location)
        return bool(system.isdir(path))


def _tars_in(folder: Location) -> list[Location]:
    if isinstance(folder, Path):
        return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    with readable(folder, "source"):
        system, root = file_system(folder)
        names = [path.rpartition("/")[2] for path in system.ls(root, detail=False)]
    return [f"{folder.rstrip('/')}/{name}" for name in sorted(names) if name.endswith(".tar")]
