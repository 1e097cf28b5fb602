"""`shots`: a manifest whose items are the shots of another source's clips.

Ranks claim parts of the source; a part appears whole or not at all, so a repeated command makes
only what is missing, and the manifest is the same for every number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from megatron_nuwa.config import Settings
from megatron_nuwa.decoders import DecodeError, DecodeLimits, media_kind
from megatron_nuwa.decoders.settings import DEFAULT_LIMITS
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import written_atomically
from megatron_nuwa.parallel.accelerator import default_device
from preprocessing.communicator import Communicator, on_every_rank, on_first_rank
from preprocessing.shots import Network, find_shots, load_network
from preprocessing.sources import (
    Source,
    SourceItem,
    TarMember,
    local_copy,
    media_name,
    named_as_source,
    read_source,
)
from preprocessing.sources.items import Media
from preprocessing.state import writing

# Small parts keep many ranks busy and lose little where one dies; a folder holds so many files.
ITEMS_A_PART = 16
MOST_PARTS = 1 << 16
RULES_VERSION = 1


class ShotOptions(Settings):
    """What `shots` is asked for."""

    source: str
    output: Path
    threshold: float = Field(default=0.5, gt=0, lt=1)
    decode_seconds: float = Field(default=DEFAULT_LIMITS.seconds, gt=0)


@dataclass(frozen=True)
class _Parts:
    """The parts of a manifest in the making, in a hidden folder beside it."""

    folder: Path
    items: int
    size: int

    @classmethod
    def of(cls, options: ShotOptions, source: Source) -> _Parts:
        """The folder's name holds all that the rows depend on."""
        key = f"{RULES_VERSION} {source.fingerprint} {options.threshold} {options.source}"
        digest = hashlib.sha256(f"{key} {Path.cwd()}".encode()).hexdigest()[:16]
        folder = options.output.with_name(f".{options.output.name}.{digest}.parts")
        items = len(source)
        return cls(folder, items, max(ITEMS_A_PART, -(-items // MOST_PARTS)))

    @property
    def count(self) -> int:
        """How many there are."""
        return -(-self.items // self.size)

    def rows(self, part: int) -> range:
        """The source's rows of one part."""
        return range(part * self.size, min((part + 1) * self.size, self.items))

    def path(self, part: int) -> Path:
        """The file of one part."""
        return self.folder / f"{part:08d}.jsonl"

    def missing(self) -> list[int]:
        """The parts that are not there."""
        return [part for part in range(self.count) if not self.path(part).exists()]


def write_shots(options: ShotOptions, communicator: Communicator) -> None:
    """Write the manifest of the source's shots; every rank makes this call.

    Raises `UserError` (on the first rank, `PeerFailed` on the others) where the source or the
    output will not do.
    """
    on_first_rank(communicator, lambda: _check_output(options.output))
    source = on_every_rank(communicator, lambda: read_source(options.source))
    beside = communicator.gather_everywhere(communicator.machine)[: communicator.rank]
    number = beside.count(communicator.machine)
    network = on_every_rank(communicator, lambda: load_network(device_of(number)))
    parts = _Parts.of(options, source)
    missing = on_first_rank(communicator, lambda: _begin(parts, options.output))
    claims = communicator.claims()

    def work() -> None:
        while (claim := claims.claim()) < len(missing):
            if communicator.is_asked_to_stop():
                return
            with writing(options.output), written_atomically(parts.path(missing[claim])) as stream:
                for row in parts.rows(missing[claim]):
                    for line in _lines(source.item(row), network, options):
                        stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    on_every_rank(communicator, work)
    claims.close()
    on_first_rank(communicator, lambda: _finish(parts, options))


def device_of(number: int) -> torch.device:
    """Where a machine's rank of this number looks for shots: they take the GPUs in turn."""
    device = default_device()
    if device.type != "cuda":
        return device
    return torch.device("cuda", number % torch.cuda.device_count())


def _check_output(output: Path) -> None:
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output} must end in .jsonl")
    if output.exists():
        raise UserError(f"--output {output} exists already; remove it or name another file")


def _begin(parts: _Parts, output: Path) -> list[int]:
    with writing(output):
        for other in output.parent.glob(f".{output.name}.*.parts"):
            if other != parts.folder:
                shutil.rmtree(other)
        parts.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in parts.folder.glob(".*"):
            unfinished.unlink()
        return parts.missing()


def _lines(item: SourceItem, network: Network, options: ShotOptions) -> Iterator[dict[str, Any]]:
    """An item's rows: one a shot; itself where there is one, or where it cannot be read."""
    limits = DecodeLimits(seconds=options.decode_seconds)
    row = {
        "id": item.id,
        "media": _name(item.media, options.output),
        "captions": list(item.captions),
        "start": item.start,
        "end": item.end,
        "sketch": None if item.sketch is None else _name(item.sketch, options.output),
        "provenance": None if item.provenance is None else list(item.provenance),
    }
    row = {name: value for name, value in row.items() if value is not None}
    try:
        with local_copy(item.media, limits) as path, named_as_source(item.media, path):
            shots = [(item.start, item.end)]
            if media_kind(path) == "clip":
                shots = find_shots(network, path, item.start, item.end, options.threshold, limits)
    except DecodeError:
        # The farm will meet the same error, and knows what to do with it.
        yield row
        return
    if len(shots) == 1:
        yield row
        return
    for number, (start, end) in enumerate(shots):
        if number:
            # A sketch's first map is that of the item's first frame.
            row.pop("sketch", None)
        times = {"start": start, "end": end}
        own = {name: value for name, value in times.items() if value is not None}
        others = {name: value for name, value in row.items() if name not in times}
        yield {**others, "id": f"{item.id}#{number}", **own, "shot": number}


def _name(media: Media, output: Path) -> str:
    """How a manifest at `output` names a medium."""
    if isinstance(media, TarMember):
        tar = media.tar.absolute() if isinstance(media.tar, Path) else media.tar
        return str(replace(media, tar=tar))
    if isinstance(media, Path):
        media = media.absolute()
    return media_name(media, output.absolute().parent)


def _finish(parts: _Parts, options: ShotOptions) -> None:
    rows = cut = shots = 0
    with writing(options.output), written_atomically(options.output) as stream:
        for part in range(parts.count):
            content = parts.path(part).read_bytes()
            stream.write(content)
            for line in content.splitlines():
                rows += 1
                shot = json.loads(line).get("shot")
                cut += shot == 0
                shots += shot is not None
    shutil.rmtree(parts.folder, ignore_errors=True)
    print(
        f"manifest {options.output}: {rows - shots + cut:,} items, {cut:,} of them cut into "
        f"{shots:,} shots",
        flush=True,
    )
