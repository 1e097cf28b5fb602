"""A folder of media, each with sidecar files of the same name."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from megatron_nuwa.training.progress import track
from preprocessing.sources.items import Source, SourceItem, Texts, hash_of_id
from preprocessing.sources.locations import Location, file_system, join, open_binary, readable
from preprocessing.sources.samples import CAPTIONS, MEDIA, SKETCHES, sample_item


class FolderSource(Source):
    """All media below a folder, by name; an id is the path without suffixes."""

    def __init__(self, folder: Location, is_shown: bool = False) -> None:
        super().__init__(array("Q"))
        self.folder = folder
        self._media = Texts()
        self._sidecars = Texts()
        digest = hashlib.sha256()
        groups = track(_groups(folder), f"media of {folder}") if is_shown else _groups(folder)
        for name, sidecars in groups:
            self._media.append(name)
            self._sidecars.append(" ".join(sidecars))
            item, contents = self._read(len(self))
            self._id_hashes.append(hash_of_id(item.id))
            digest.update(repr((name, sidecars, contents)).encode())
        self._fingerprint = digest.hexdigest()

    def item(self, row: int) -> SourceItem:
        """The item of a row."""
        return self._read(row)[0]

    def _read(self, row: int) -> tuple[SourceItem, dict[str, bytes]]:
        name = self._media[row]
        key = _split(name)[0]
        sidecars = self._sidecars[row].split()
        contents = {each: self._content(key + each) for each in sidecars if each in CAPTIONS}
        sketches = [join(self.folder, key + each) for each in sidecars if each in SKETCHES]
        media = join(self.folder, name)
        sketch = sketches[0] if sketches else None
        return sample_item(key, media, sketch, contents, str(join(self.folder, key))), contents

    def _content(self, name: str) -> bytes:
        location = join(self.folder, name)
        with readable(location), open_binary(location) as stream:
            return stream.read()


def _groups(folder: Location) -> Iterator[tuple[str, list[str]]]:
    """Each medium below the folder with the suffixes of its sidecars, in order of their names."""
    for directory, names in _directories(folder):
        suffixes = defaultdict(set)
        media = []
        for name in names:
            key, suffix = _split(name)
            if suffix in (*CAPTIONS, *SKETCHES):
                suffixes[key].add(suffix)
            elif suffix.lower() in MEDIA:
                media.append(name)
        for name in sorted(media):
            yield directory + name, sorted(suffixes[_split(name)[0]])


def _split(name: str) -> tuple[str, str]:
    """A name without its suffix, and the suffix; unlike in a tar, other dots are part of names."""
    for suffix in SKETCHES:
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return os.path.splitext(name)


def _directories(folder: Location) -> Iterator[tuple[str, list[str]]]:
    """Every directory, as a prefix of names in it, with its files; hidden ones are left out."""
    if isinstance(folder, Path):
        for place, below, names in os.walk(folder):
            below[:] = sorted(name for name in below if not name.startswith("."))
            relative = Path(place).relative_to(folder).as_posix()
            prefix = "" if relative == "." else relative + "/"
            yield prefix, [name for name in names if not name.startswith(".")]
        return
    with readable(folder, "folder"):
        system, root = file_system(folder)
        found: dict[str, list[str]] = defaultdict(list)
        for path in system.find(root):
            relative = path.removeprefix(root.rstrip("/")).lstrip("/")
            place, _, name = relative.rpartition("/")
            if not any(part.startswith(".") for part in relative.split("/")):
                found[place + "/" if place else ""].append(name)
    for prefix in sorted(found):
        yield prefix, found[prefix]
