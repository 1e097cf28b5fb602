"""`shots`: a manifest whose items are the shots of another source's clips.

Ranks claim parts of the source; a part appears whole or not at all, so a repeated command makes
only what is missing, and the manifest is the same for every number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from megatron_nuwa.decoders import DecodeError
from megatron_nuwa.decoders.settings import DEFAULT_LIMITS
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import written_atomically
from megatron_nuwa.parallel.accelerator import default_device
from preprocessing.attempts import Attempts, Journal, Journals, Trial, try_item
from preprocessing.communicator import (
    Claims,
    Communicator,
    held_on_first_rank,
    on_every_rank,
    on_first_rank,
)
from preprocessing.film_progress import FilmProgress
from preprocessing.options import LimitOptions
from preprocessing.shot_items import ShotDemands, Window, shots_alone, shots_of_item
from preprocessing.shot_parts import Parts, only_command
from preprocessing.shots import Network, load_network
from preprocessing.sources import Source, SourceItem, TarMember, media_name, read_source
from preprocessing.sources.items import Media
from preprocessing.state import writing

SHOWN_FAILURES = 5


class ShotOptions(LimitOptions):
    """What `shots` is asked for."""

    source: str
    output: Path
    threshold: float = Field(default=0.5, gt=0, lt=1)
    film_hours: float = Field(default=DEFAULT_LIMITS.film_hours, gt=0, le=1e6)

    @property
    def demands(self) -> ShotDemands:
        """What is asked of every item."""
        limits = self.limits.model_copy(update={"film_hours": self.film_hours})
        return ShotDemands(threshold=self.threshold, limits=limits)


@dataclass(frozen=True)
class _Finder:
    """Finds the shots of rows, on one rank."""

    source: Source
    options: ShotOptions
    network: Network
    device: torch.device
    before: Mapping[int, Attempts]

    def lines(self, row: int, journal: Journal) -> Iterator[dict[str, Any]]:
        """What becomes of a row: a line a shot, or itself where there is one or it has failed."""
        item = self.source.item(row)
        line = _line_of(item, self.options.output)
        try:
            shots = self._shots(row, item, journal)
        except DecodeError as error:
            # Not left out: the farm takes less of it, and knows what to do if that is too much.
            yield {**line, "not_cut": str(error)}
            return
        if len(shots) == 1:
            yield line
            return
        for number, (start, end) in enumerate(shots):
            if number:
                # A sketch's first map is that of the item's first frame.
                line.pop("sketch", None)
            times = {"start": start, "end": end}
            own = {name: value for name, value in times.items() if value is not None}
            others = {name: value for name, value in line.items() if name not in times}
            yield {**others, "id": f"{item.id}#{number}", **own, "shot": number}

    def _shots(self, row: int, item: SourceItem, journal: Journal) -> list[Window]:
        demands = self.options.demands
        return try_item(
            Trial(row, item.media, self.before.get(row, Attempts()), self.options.attempts),
            journal,
            lambda: shots_of_item(item, self.network, demands),
            lambda: shots_alone(item, self.device, demands),
        )


def write_shots(options: ShotOptions, communicator: Communicator) -> None:
    """Write the manifest of the source's shots; every rank makes this call.

    Raises `UserError` (on the first rank, `PeerFailed` on the others) where the source or the
    output will not do.
    """
    on_first_rank(communicator, lambda: _check_output(options.output))
    source = on_every_rank(communicator, lambda: read_source(options.source))
    beside = communicator.gather_everywhere(communicator.machine)[: communicator.rank]
    number = beside.count(communicator.machine)
    device, network = on_every_rank(communicator, lambda: _network_of(number))
    key = f"{source.fingerprint} {options.threshold} {options.source}"
    parts = Parts.of(options.output, len(source), key)
    with held_on_first_rank(communicator, only_command(options.output)):
        missing, before = on_first_rank(communicator, lambda: _begin(parts, options.output))
        claims = communicator.claims()
        finder = _Finder(source, options, network, device, before)
        is_first = communicator.rank == 0
        with FilmProgress(parts.done, parts.items) if is_first else nullcontext():
            on_every_rank(communicator, lambda: _find(finder, parts, missing, claims, communicator))
        claims.close()
        on_first_rank(communicator, lambda: _finish(parts, options))


def device_of(number: int) -> torch.device:
    """Where a machine's rank of this number looks for shots: they take the GPUs in turn."""
    device = default_device()
    if device.type != "cuda":
        return device
    return torch.device("cuda", number % torch.cuda.device_count())


def _network_of(number: int) -> tuple[torch.device, Network]:
    device = device_of(number)
    return device, load_network(device)


def _check_output(output: Path) -> None:
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output} must end in .jsonl")
    if output.exists():
        raise UserError(f"--output {output} exists already; remove it or name another file")


def _begin(parts: Parts, output: Path) -> tuple[list[int], dict[int, Attempts]]:
    # Once more, now that no other command can finish it.
    _check_output(output)
    with writing(output):
        return parts.begin(output)


def _find(
    finder: _Finder, parts: Parts, missing: list[int], claims: Claims, communicator: Communicator
) -> None:
    """This rank's share of the missing parts."""
    output = finder.options.output
    journals = Journals(parts.attempts)
    try:
        with journals.open() as journal:
            while (claim := claims.claim()) < len(missing):
                if communicator.is_asked_to_stop():
                    return
                part = missing[claim]
                lines = [
                    json.dumps(line, ensure_ascii=False).encode() + b"\n"
                    for row in parts.rows(part)
                    for line in finder.lines(row, journal)
                ]
                with writing(output), written_atomically(parts.path(part)) as stream:
                    stream.writelines(lines)
    finally:
        journals.close()


def _line_of(item: SourceItem, output: Path) -> dict[str, Any]:
    """An item as a line of the manifest."""
    line = {
        "id": item.id,
        "media": _name(item.media, output),
        "captions": list(item.captions),
        "start": item.start,
        "end": item.end,
        "sketch": None if item.sketch is None else _name(item.sketch, output),
        "provenance": None if item.provenance is None else list(item.provenance),
    }
    return {name: value for name, value in line.items() if value is not None}


def _name(media: Media, output: Path) -> str:
    """How a manifest at `output` names a medium."""
    if isinstance(media, TarMember):
        tar = media.tar.absolute() if isinstance(media.tar, Path) else media.tar
        return str(replace(media, tar=tar))
    if isinstance(media, Path):
        media = media.absolute()
    return media_name(media, output.absolute().parent)


def _finish(parts: Parts, options: ShotOptions) -> None:
    """Put the parts together and say what became of the items."""
    rows = cut = shots = failed = 0
    shown: list[str] = []
    with writing(options.output), written_atomically(options.output) as stream:
        for part in range(parts.count):
            content = parts.path(part).read_bytes()
            stream.write(content)
            for line in map(json.loads, content.splitlines()):
                rows += 1
                cut += line.get("shot") == 0
                shots += "shot" in line
                if "not_cut" in line:
                    failed += 1
                    if failed <= SHOWN_FAILURES:
                        shown.append(f"  failed {line['id']}: {line['not_cut']}")
    shutil.rmtree(parts.folder, ignore_errors=True)
    told = [
        f"manifest {options.output}: {rows - shots + cut:,} items, {cut:,} of them cut into "
        f"{shots:,} shots, {failed:,} failed",
        *shown,
    ]
    if failed > len(shown):
        told.append(f"  and {failed - len(shown):,} more, whose rows say why in not_cut")
    print("\n".join(told), flush=True)
