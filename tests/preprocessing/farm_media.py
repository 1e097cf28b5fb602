"""What the tests of this folder share beside fixtures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

CAPTIONS = ["a red square moves left", "a blue circle rests", "green stripes under a grey sky"]

WriteClip = Callable[..., Path]


def write_manifest(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenize_command(source: str | Path, output: Path, tools: Path, *more: str | Path) -> list[str]:
    """The arguments of `tokenize` with the tokenizers of the fixture `tools`, without a report."""
    return [
        *("tokenize", str(source), "--output", str(output), "--no-report"),
        *("--vqgan", str(tools / "vqgan.safetensors"), "--bpe", str(tools / "bpe.json")),
        *map(str, more),
    ]
