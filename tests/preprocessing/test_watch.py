"""What the farm tells while it works and when it is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from preprocessing import event_file
from preprocessing.__main__ import main
from preprocessing.figures import Figures, History
from preprocessing.watch import Watch


def arguments(manifest: Path, output: Path, tools: Path) -> list[str]:
    return tokenize_command(manifest, output, tools, "--items-per-shard", "4", "--report")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def work(watch: Watch, clock: Clock, seconds: int, figures: Figures | None = None) -> None:
    """Let so many seconds pass, with the same figures in each of them."""
    for _ in range(seconds):
        clock.now += 1
        watch.add(figures or Figures())
        watch.tick()


def shown(watch: Watch) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(watch._table())
    return captured.get()


BUSY = Figures(
    items=10,
    frames=80,
    decode_seconds=2.0,
    encode_seconds=0.75,
    starved_seconds=0.25,
    queue_seconds=4,
    queue_fill=3.0,
)
STARVED = Figures(starved_seconds=1.0, queue_seconds=4)


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
    figures = Figures(items=5, failed=1, frames=40, shards=1, decode_seconds=1, queue_seconds=2)
    with Watch(10, 8, tmp_path) as watch:
        watch.add(figures)
        watch.add(Figures(queue_fill=1.0))
        text = shown(watch)
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


def test_a_stall_shows_within_a_minute_however_long_the_work_has_gone_well(
    tmp_path: Path, clock: Clock
) -> None:
    watch = Watch(100_000, 8, tmp_path, clock=clock)
    work(watch, clock, 5000, BUSY)
    text = shown(watch)
    for part in ("10.0 items/s, 10.0 clips/s, 80.0 frames/s", "75% full", "starved 25%"):
        assert part in text
    assert "0:01:23, 10.0 items/s" not in text
    work(watch, clock, 30, STARVED)
    assert "5.0 items/s, 5.0 clips/s, 40.0 frames/s" in shown(watch)
    work(watch, clock, 30, STARVED)
    text = shown(watch)
    for part in (
        "50,000 of 100,000",
        "0.0 items/s, 0.0 clips/s, 0.0 frames/s",
        "– · – · – an item",
        "0% full, encoders starved 100%",
        # The totals stay those of all time.
        "1:24:20, 9.9 items/s",
    ):
        assert part in text, text


def test_time_left_goes_by_the_last_five_minutes(tmp_path: Path, clock: Clock) -> None:
    watch = Watch(10_000, 1, tmp_path, clock=clock)
    assert watch._left() == "?"
    work(watch, clock, 600, Figures(items=10))
    # 4,000 items at 10 a second.
    assert watch._left() == "0:06:40"
    work(watch, clock, 300, Figures(items=1))
    # 3,700 items at 1 a second.
    assert watch._left() == "1:01:40"
    work(watch, clock, 300)
    assert watch._left() == "?"
    watch.add(Figures(items=3700))
    assert watch._left() == "0:00:00"


def test_a_log_is_told_of_a_stall_each_ten_minutes(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(10_000, 1, tmp_path, clock=clock)
    work(watch, clock, 120, Figures(items=10))
    assert capsys.readouterr().out == (
        "tokenize: 1000/10000, 10.0 items/s, 0 failed, 0:15:00 left\n"
    )
    work(watch, clock, 1290)
    stalled = "tokenize: 1200/10000, 0.0 items/s, 0 failed, ? left\n"
    assert capsys.readouterr().out == 2 * stalled


def test_scalars_are_those_of_the_time_since_the_last_ones(tmp_path: Path, clock: Clock) -> None:
    with Watch(1000, 8, tmp_path, clock=clock) as watch:
        work(watch, clock, 10, BUSY)
        work(watch, clock, 10, Figures(items=1, frames=8, encode_seconds=0.1, queue_seconds=1))
        work(watch, clock, 10, STARVED)
        # The end comes too soon for rates of its own.
        clock.now += 0.5
        watch.add(Figures(items=5))
    events = EventAccumulator(str(tmp_path))
    events.Reload()

    def values(tag: str) -> list[float]:
        return [event.value for event in events.Scalars(f"farm/{tag}")]

    assert values("items_per_second") == [10, 1, 0]
    assert values("frames_per_second") == [80, 8, 0]
    assert values("queue_fill") == [0.75, 0, 0]
    assert values("encoders_starved") == pytest.approx([0.25, 0, 1])
    assert values("items") == [100, 110, 110, 115]


def test_the_scalars_of_a_farm_that_goes_on_come_after_those_before(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard orders files by the second in their names.
    monkeypatch.setattr(event_file.time, "time", lambda: 1e9 + clock.now)
    killed = Watch(1000, 1, tmp_path, clock=clock)
    work(killed, clock, 60, Figures(items=10))
    killed._close_scalars()
    with Watch(530, 1, tmp_path, done=470, clock=clock) as watch:
        work(watch, clock, 53, Figures(items=10))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    # TensorBoard forgets what comes again: what the first one had encoded and not written.
    steps = [event.step for event in events.Scalars("farm/items_per_second")]
    assert steps == [*range(100, 700, 100), *range(570, 1000, 100), 1000]


def test_a_corpus_that_is_gone_on_with_keeps_its_curves(
    manifest: Path, tools: Path, tmp_path: Path
) -> None:
    output, curves = tmp_path / "corpus", tmp_path / "corpus.farm" / "tensorboard"
    assert main(arguments(manifest, output, tools)) == 0
    (output / "shard-000001.json").unlink()
    assert main(arguments(manifest, output, tools)) == 0
    files = [EventFileLoader(str(path)).Load() for path in curves.iterdir()]
    steps = [[event.step for event in file if event.HasField("summary")] for file in files]
    assert len(steps) == 2
    # The second one has made four of the eight items.
    assert {found[-1] for found in steps} == {8}
    assert min(found[0] for found in steps) >= 4


def test_figures_of_the_past_are_forgotten() -> None:
    history, figures = History(0, longest_seconds=300, every_seconds=1), Figures()
    assert history.span(60, 0, figures) == (0, figures)
    for tenth in range(1, 100_001):
        figures.add(Figures(items=1))
        history.note(tenth / 10, figures)
    assert len(history._notes) <= 302
    for seconds in (60, 300):
        span = history.span(seconds, 10_000, figures)
        assert span.seconds == pytest.approx(seconds, abs=1.01)
        assert span.figures.items == pytest.approx(10 * span.seconds)
    # What is asked for beyond the longest is as long as there are notes.
    assert history.span(9000, 10_000, figures).seconds == pytest.approx(300, abs=2.01)
