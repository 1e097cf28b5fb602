"""The corpus of clips that farms are killed, starved and shut out over."""

from __future__ import annotations

from pathlib import Path

from farm_media import CAPTIONS, tokenize_command

SHARDS = 8
ITEMS_PER_SHARD = 4


def clip_rows(count: int = SHARDS * ITEMS_PER_SHARD) -> list[dict[str, object]]:
    """Clips of the `media` fixture over and over, some broken."""
    return [
        {
            "id": f"item{n}",
            "media": "corrupt.mp4" if n % 11 == 5 else f"clip{n % 7}.mp4",
            "captions": CAPTIONS[: n % 3 + 1],
        }
        for n in range(count)
    ]


def clip_command(manifest: Path, output: Path, tools: Path, *more: str) -> list[str]:
    """The arguments of the farm that makes a corpus of them."""
    clips = ("--frames", "4", "--fps", "5", "--items-per-shard", str(ITEMS_PER_SHARD))
    return tokenize_command(manifest, output, tools, *clips, *more)
