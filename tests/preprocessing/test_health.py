"""A machine at which everything fails stops the farm instead of spoiling the corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest

from megatron_nuwa.errors import UserError
from preprocessing import health
from preprocessing.__main__ import main
from preprocessing.health import WINDOW, Health


def test_items_that_fail_here_and_there_are_no_reason_to_stop() -> None:
    watched = Health()
    for failed in np.random.default_rng(0).random(5 * WINDOW) < 0.9:
        watched.count(bool(failed), "node", "it is broken")


def test_a_row_of_failures_stops_at_once_when_it_fills_the_window() -> None:
    watched = Health(0.5)
    for number in range(WINDOW):
        watched.count(number % 2 == 0, "node", None)
    watched.count(True, "node7", "no disk")
    with pytest.raises(UserError, match=r"on node7 1,001 of the last 2,000 items failed.*no disk"):
        watched.count(True, "node7", "no disk")
    forgiving = Health(1)
    for _ in range(2 * WINDOW):
        forgiving.count(True, "node", "no disk")


def test_a_farm_without_its_media_writes_nothing_and_goes_on_when_they_are_back(
    media: Path,
    tools: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(health, "WINDOW", 8)
    away = media / "away"
    rows: list[dict[str, object]] = [
        {"id": n, "media": f"image{n % 6}.png", "captions": CAPTIONS} for n in range(60)
    ]
    manifest = write_manifest(media / "health.jsonl", rows)
    output = tmp_path / "corpus"
    more = ("--frames", "1", "--items-per-shard", "30")
    command = tokenize_command(manifest, output, tools, *more)
    away.mkdir()
    for picture in media.glob("image*.png"):
        picture.rename(away / picture.name)
    try:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "8 of the last 8 items failed" in error
        assert "--most-failures 1" in error
        assert not list(output.glob("shard-*"))
        assert not (output / "corpus.json").exists()
    finally:
        for picture in away.iterdir():
            picture.rename(media / picture.name)
        away.rmdir()
    assert main(command) == 0
    assert "60 items" in capsys.readouterr().out
