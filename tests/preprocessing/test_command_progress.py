"""Long commands show how far they are: a bar on a terminal, lines in a log, nothing if short."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from test_corpus_tools import write_corpus

from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.training import progress
from preprocessing.__main__ import main
from preprocessing.plan import Plan, PlanKey
from preprocessing.sources import SourceItem, read_source
from preprocessing.split import is_held_out


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Have every look at the clock of progress take so many seconds."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) * request.param)
    monkeypatch.setattr(progress, "time", clock)


slow = pytest.mark.parametrize("pace", [5.0], indirect=True)
fast = pytest.mark.parametrize("pace", [0.0], indirect=True)


@pytest.fixture
def commands(tmp_path: Path, bpe: TextTokenizer) -> dict[str, tuple[list[str], list[str]]]:
    """What is typed, and the last line of each thing that it counts."""
    one, two = (write_corpus(tmp_path / name, bpe, name, sketch="s") for name in "ab")
    rows: list[dict[str, object]] = [
        {"id": n, "media": "x.png", "captions": CAPTIONS} for n in range(4)
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    both, train, held = (tmp_path / name for name in ("both", "train", "held"))
    counted = ("captions", "codes", "sketches' codes")
    # Three items a video.
    away = 3 * sum(is_held_out(f"a/video{number}.mp4", 0.5) for number in range(10))
    return {
        "verify": (["verify", str(one)], [f"shards of {one} checked: 3/3"]),
        "verify --full": (
            ["verify", str(one), "--full"],
            [f"shards of {one} checked: 3/3", f"items of {one} checked: 30/30"],
        ),
        "stats": (
            ["stats", str(one)],
            [
                *(f"items whose {what} are counted: 30/30" for what in counted),
                "items whose metadata are read: 30/30",
            ],
        ),
        "merge": (
            ["merge", str(one), str(two), "--output", str(both)],
            ["ids compared: 60/60", f"shards of {both} made: 6/6"],
        ),
        "split": (
            [
                *("split", str(one), "--held-out", "0.5"),
                *("--output-train", str(train), "--output-heldout", str(held)),
            ],
            [
                f"items of {one} divided: 30/30",
                f"items of {train} written: {30 - away}/{30 - away}",
                f"items of {held} written: {away}/{away}",
            ],
        ),
        "train-bpe": (
            [
                *("train-bpe", str(manifest), "--vocabulary-size", "530"),
                *("--output", str(tmp_path / "bpe.json")),
            ],
            [f"rows of manifest {manifest}: 4", f"items of {manifest} read: 4/4"],
        ),
    }


NAMES = ("verify", "verify --full", "stats", "merge", "split", "train-bpe")


@slow
@pytest.mark.parametrize("name", NAMES)
def test_a_log_is_told_how_far_a_long_command_is(
    name: str,
    pace: None,
    commands: dict[str, tuple[list[str], list[str]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, last = commands[name]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in last:
        assert line in lines
        assert sum(each.startswith(line.partition(":")[0]) for each in lines) <= 10


@fast
@pytest.mark.parametrize("name", NAMES)
def test_a_short_command_tells_a_log_its_result_alone(
    name: str,
    pace: None,
    commands: dict[str, tuple[list[str], list[str]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, last = commands[name]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert not any(line.partition(":")[0] in out for line in last)


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_gets_bars(
    name: str,
    commands: dict[str, tuple[list[str], list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    command, last = commands[name]
    assert main(command) == 0
    told = capsys.readouterr().err
    for line in last:
        description, _, counts = line.rpartition(": ")
        assert description in told
        assert (counts if "/" in counts else f"{counts}/?") in told


@slow
def test_a_farm_tells_how_many_rows_it_has_read_and_cut(
    pace: None, media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [
        {"id": f"i{n}", "media": "image0.png", "captions": CAPTIONS} for n in range(5)
    ]
    manifest = write_manifest(media / f"{tmp_path.name}.jsonl", rows)
    assert main(tokenize_command(manifest, tmp_path / "corpus", tools)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"rows of manifest {manifest}: 5" in lines
    assert "rows cut into shards: 5/5" in lines


@slow
def test_a_plan_with_repeated_ids_shows_its_second_pass(
    pace: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [SourceItem("same", Path("x.png"), ("a",)) for _ in range(4)]
    key = PlanKey(source="m", manifest_sha256="0", items_per_shard=2)
    Plan(tmp_path / "plan", 2).write(items, key)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "repeated ids looked for: 4/4"
    assert "rows cut into shards: 4/4" in lines


@slow
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "tar", "folder"])
def test_sources_are_followed_where_it_is_asked_for(
    kind: str, pace: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / (f"m.{kind}" if kind != "folder" else "m")
    rows = [{"id": f"i{n}", "media": "x.png", "captions": "y"} for n in range(3)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        path.write_text("id,media,captions\n" + "".join(f"i{n},x.png,y\n" for n in range(3)))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "tar":
        (tmp_path / "a.png").touch()
        with tarfile.open(path, "w") as archive:
            for n in range(3):
                archive.add(tmp_path / "a.png", f"{n}.png")
    else:
        path.mkdir()
        for n in range(3):
            (path / f"{n}.png").touch()
    assert len(read_source(path)) == 3
    assert capsys.readouterr().out == ""
    assert len(read_source(path, is_shown=True)) == 3
    told = {"tar": "samples of", "folder": "media of"}.get(kind, "rows of manifest")
    count = "3/3" if kind == "parquet" else "3"
    assert capsys.readouterr().out.splitlines()[-1] == f"{told} {path}: {count}"
