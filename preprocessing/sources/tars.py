"""webdataset tars of media and captions, read through an index of where their members lie."""

from __future__ import annotations

import hashlib
import tarfile
from array import array
from collections.abc import Iterator, Sequence

from megatron_nuwa.errors import UserError
from megatron_nuwa.training.progress import track
from preprocessing.sources.items import Source, SourceItem, TarMember, Texts, hash_of_id
from preprocessing.sources.locations import (
    Location,
    open_binary,
    parent,
    readable,
    reader_of,
    suffix,
)
from preprocessing.sources.samples import CAPTIONS, MEDIA, SKETCHES, key_of, sample_item

# By suffix in lower case: the raw name without the key, the offset and the size.
Members = dict[str, tuple[str, int, int]]


class TarSource(Source):
    """The samples of several tars, in order; an id is the tar's name and the sample's key."""

    def __init__(self, tars: Sequence[Location], is_shown: bool = False) -> None:
        super().__init__(array("Q"))
        self.folder = parent(tars[0])
        self._tars = list(tars)
        self._tar = array("l")
        self._keys = Texts()
        # Four members a sample: medium, .txt, .json, sketch.
        self._affixes = Texts()
        self._places = array("q")
        digest = hashlib.sha256()
        samples = ((number, *each) for number, tar in enumerate(tars) for each in _samples(tar))
        if is_shown:
            samples = track(samples, f"samples of {tars[0]}" + " and others" * (len(tars) > 1))
        for number, key, members in samples:
            self._append(number, key, members)
            item, sidecars = self._read(len(self))
            self._id_hashes.append(hash_of_id(item.id))
            medium = item.media
            assert isinstance(medium, TarMember)
            digest.update(repr((item.id, medium.name, medium.size, sidecars)).encode())
        self._fingerprint = digest.hexdigest()

    def item(self, row: int) -> SourceItem:
        """The item of a row."""
        return self._read(row)[0]

    def _append(self, tar: int, key: str, members: Members) -> None:
        media = [name for name in members if name in MEDIA]
        sketches = [name for name in members if name in SKETCHES]
        if len(media) > 1:
            raise UserError(
                f"tar {self._tars[tar]}: the sample {key!r} has {len(media)} media "
                f"({', '.join(media)}), and one is expected"
            )
        self._tar.append(tar)
        self._keys.append(key)
        for found in (media, *([name] for name in CAPTIONS), sketches[:1]):
            affix, *place = members.get(found[0] if found else "", ("", 0, -1))
            self._affixes.append(affix)
            self._places.extend(place)

    def _read(self, row: int) -> tuple[SourceItem, dict[str, bytes]]:
        tar = self._tars[self._tar[row]]
        reader = reader_of(tar)
        key = self._keys[row]
        medium, *sidecars, sketch = (self._member(row, number) for number in range(4))
        contents = {
            name: reader.read(member.offset, member.size)
            for name, member in zip(CAPTIONS, sidecars, strict=True)
            if member.size >= 0
        }
        stem = str(tar).rpartition("/")[2].removesuffix(".tar")
        where = f"tar {tar}: {key}"
        item = sample_item(
            f"{stem}/{key}", medium, sketch if sketch.size >= 0 else None, contents, where
        )
        return item, contents

    def _member(self, row: int, number: int) -> TarMember:
        place = 4 * row + number
        offset, size = self._places[2 * place], self._places[2 * place + 1]
        key = self._keys[row]
        # Suffixes hold no slash, so what ends in one stands before the key.
        before, slash, rest = self._affixes[place].rpartition("/")
        raw_name = before + slash + key + rest
        return TarMember(self._tars[self._tar[row]], key + rest.lower(), raw_name, offset, size)


def _samples(tar: Location) -> Iterator[tuple[str, Members]]:
    """Key and members of each sample: neighbours with the same key."""
    if suffix(tar) != ".tar":
        raise UserError(f"tar {tar} must end in .tar; unpack it first where it is compressed")
    current, members = None, Members()
    for raw_name, offset, size in _files(tar):
        name = raw_name.removeprefix("./")
        key, rest = key_of(name)
        if current is not None and key != current:
            yield current, members
            members = Members()
        current = key
        before = raw_name.removesuffix(name)
        members[rest.lower()] = before + rest, offset, size
    if current is not None:
        yield current, members


def _files(tar: Location) -> Iterator[tuple[str, int, int]]:
    """Raw name, offset and size of each file that is not hidden."""
    with readable(tar, "tar"), open_binary(tar) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    # tarfile keeps all members; a tar may have more than fit in memory.
                    archive.members = []  # type: ignore[attr-defined]
                    # A link could name any file of this machine.
                    parts = member.name.removeprefix("./").split("/")
                    hidden = any(part.startswith(".") for part in parts)
                    if member.isreg() and not hidden:
                        yield member.name, member.offset_data, member.size
        except tarfile.TarError as error:
            raise UserError(f"tar {tar} is damaged: {error}") from error
