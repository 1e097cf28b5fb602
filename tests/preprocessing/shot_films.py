"""What tests of `shots` share: films, a network that needs no weights, and the rows made."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from farm_media import CAPTIONS, write_manifest
from torch import Tensor

from preprocessing.__main__ import main

# A change of the mean level that is called a cut.
JUMP = 10
# At 25 frames a second it has one cut, at 1.2 s.
FILM = [30] * 30 + [200] * 25


def changes(frames: Tensor) -> Tensor:
    """A network that calls every jump of the mean level a cut."""
    means = frames.float().mean(dim=(2, 3, 4))
    jumps = (means[:, 1:] - means[:, :-1]).abs() > JUMP
    logits = torch.where(jumps, 9.0, -9.0)
    return torch.cat([logits, logits.new_full((1, 1), -9.0)], dim=1)[..., None]


def films(folder: Path, *names: str) -> Path:
    """A manifest of films, each of which is called as its file."""
    rows: list[dict[str, object]] = [
        {"id": Path(name).stem, "media": name, "captions": CAPTIONS[:1]} for name in names
    ]
    return write_manifest(folder / "films.jsonl", rows)


def find(source: Path, output: Path, *more: str) -> int:
    """Run `shots`."""
    return main(["shots", str(source), "--output", str(output), *more])


def rows_of(output: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each item of the source."""
    rows = defaultdict(list)
    for line in map(json.loads, output.read_text().splitlines()):
        rows[line["id"].partition("#")[0]].append(line)
    return rows


def starts_of(rows: list[dict[str, Any]]) -> list[float | None]:
    """Where the shots of one item begin."""
    return [row.get("start") for row in rows]
