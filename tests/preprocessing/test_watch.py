"""What the farm tells while it works and when it is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from preprocessing.__main__ import main
from preprocessing.figures import Figures
from preprocessing.watch import Watch


def arguments(manifest: Path, output: Path, tools: Path) -> list[str]:
    return tokenize_command(manifest, output, tools, "--items-per-shard", "4", "--report")


@pytest.fixture
def manifest(media: Path) -> Path:
    rows: list[dict[str, object]] = [
        {"id": f"<{n}>", "media": f"image{n}.png", "captions": CAPTIONS} for n in range(8)
    ]
    return write_manifest(media / "watch.jsonl", rows)


def test_report_and_scalars_stand_beside_the_corpus(
    manifest: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "corpus"
    assert main(arguments(manifest, output, tools)) == 0
    assert f"report {tmp_path / 'corpus.farm' / 'report.html'}" in capsys.readouterr().out
    assert all(path.is_file() for path in output.iterdir())
    page = (tmp_path / "corpus.farm" / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 12
    assert "&lt;0&gt;" in page
    assert "<0>" not in page
    assert "… does not exist" in page
    events = EventAccumulator(str(tmp_path / "corpus.farm" / "tensorboard"))
    events.Reload()
    assert events.Scalars("farm/items")[-1].value == 8
    assert events.Scalars("farm/failed")[-1].value == 2
    assert events.Scalars("farm/items_per_second")[-1].value > 0


def test_table_shows_speed_stages_queue_failures_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    figures = Figures(items=5, failed=1, frames=40, shards=1, decode_seconds=1, queue_samples=2)
    with Watch(10, 8, tmp_path) as watch:
        watch.add(figures)
        watch.add(Figures(queue_fill=1.0))
        console = Console(width=100)
        with console.capture() as captured:
            console.print(watch._table())
    text = captured.get()
    for part in ("5 of 10", "items/s", "clips/s", "200.0 ms", "50% full", "failed", "time left"):
        assert part in text
    capsys.readouterr()


def test_log_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(20, 1, tmp_path) as watch:
        for _ in range(20):
            watch.add(Figures(items=1))
            watch._show()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("tokenize: 20/20, ")
    assert lines[-1].endswith("0 failed, 0:00:00 left")
