"""What a farm reads of its manifest, at the start and when it goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from farm_media import CAPTIONS, write_manifest
from farm_runs import contents
from power import Disk

from megatron_nuwa.data.shards import write_shard
from megatron_nuwa.errors import UserError
from preprocessing.__main__ import main
from preprocessing.plan import Plan, PlanKey
from preprocessing.sources import manifests, read_manifest, read_source, rows
from preprocessing.state import FarmFolder

ROWS = 6


@pytest.fixture
def command(media: Path, tools: Path, tmp_path: Path) -> list[str]:
    lines: list[dict[str, object]] = [
        {"id": f"i{n}", "media": f"image{n}.png", "captions": CAPTIONS[:1]} for n in range(ROWS)
    ]
    manifest = write_manifest(media / f"{tmp_path.name}.jsonl", lines)
    return [
        *("tokenize", str(manifest), "--output", str(tmp_path / "corpus"), "--no-report"),
        *("--vqgan", str(tools / "vqgan.safetensors"), "--bpe", str(tools / "bpe.json")),
        *("--items-per-shard", "2"),
    ]


def test_a_corpus_outlasts_a_power_loss_as_soon_as_it_has_its_commit(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, corpus = Disk(monkeypatch), tmp_path / "corpus"
    assert main(command) == 0
    committed = disk.of(corpus / "corpus.json")
    others = {path.name for path in corpus.iterdir()} - {"corpus.json"}
    assert len(others) == 2 * (ROWS // 2) + 2
    # The commit must not be there without a file that it lists.
    assert others <= committed.neighbours
    assert disk.lost(corpus) == []


def test_a_corpus_that_is_mended_is_none_meanwhile(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus"
    assert main(command) == 0
    before = contents(corpus)
    (corpus / "shard-000001.tar").unlink()
    (corpus / ".shard-000001.tar.left").write_bytes(b"of a killed farm")
    seen: list[list[str]] = []

    def noted(folder: Path, *arguments: Any, **options: Any) -> Any:
        seen.append([path.name for path in corpus.iterdir() if path.name.startswith((".", "c"))])
        return write_shard(folder, *arguments, **options)

    monkeypatch.setattr("preprocessing.assembly.write_shard", noted)
    assert main(command) == 0
    assert seen == [[]]
    assert contents(corpus) == before


def test_a_corpus_that_was_begun_by_other_rules_is_not_gone_on_with(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    path = tmp_path / "corpus" / "settings.json"
    settings = json.loads(path.read_text())
    # The first farms wrote no such field.
    del settings["encode_rules"]
    path.write_text(json.dumps(settings))
    before = contents(tmp_path / "corpus")
    assert main(command) != 0
    assert "was begun with encode_rules = 1, and now it is 2" in capsys.readouterr().err
    assert contents(tmp_path / "corpus") == before


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows of manifests that are parsed and checked, as errors call them."""
    read: list[str] = []
    check_row = rows.check_row

    def noted(row, where):  # type: ignore[no-untyped-def]
        read.append(where)
        return check_row(row, where)

    for module in (rows, manifests):
        monkeypatch.setattr(module, "check_row", noted)
    return read


def test_a_farm_that_goes_on_parses_no_manifest(
    command: list[str],
    rows_read: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus = tmp_path / "corpus"
    lost = ["corpus.json", "shard-000001.json"]

    def go_on(names: list[str]) -> int:
        rows_read.clear()
        for name in names:
            (corpus / name).unlink()
        assert main(command) == 0
        assert contents(corpus) == whole
        return len(rows_read)

    with monkeypatch.context() as patch:
        # The plan is there as long as a corpus is unfinished.
        patch.setattr(FarmFolder, "forget_plan", lambda _: None)
        assert main(command) == 0
        # Once to check it, once to cut it, and its first row to see that it is an image.
        assert len(rows_read) == 2 * ROWS + 1
        whole = contents(corpus)
        assert go_on(lost[:1]) <= 1
        assert go_on(lost) <= 1
    # A finished corpus has no plan any more, and reads rows only where one is needed.
    assert go_on(lost[:1]) <= 1
    assert go_on(lost) == ROWS + 1
    rows_read.clear()
    capsys.readouterr()
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().out
    assert len(rows_read) == 1


def test_another_content_of_the_manifest_is_read_and_refused(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Path(command[1])
    good = manifest.read_bytes()
    assert main(command) == 0
    manifest.write_bytes(good[:-1])
    assert main(command) == 2
    assert "begun with another content of the manifest" in capsys.readouterr().err
    manifest.write_bytes(good + b'{"id": 7}\n')
    assert main(command) == 2
    assert "line 7: the field 'media' is missing" in capsys.readouterr().err
    manifest.write_bytes(good)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_fingerprint_of_unread_rows_is_that_of_read_ones(kind: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"m.{kind}"
    lines = [{"id": f"i{n}", "media": "x.png", "captions": "é"} for n in range(30)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    elif kind == "csv":
        path.write_text("id,media,captions\n" + "".join(f"i{n},x.png,é\n" for n in range(30)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    unread = read_source(path, checked=False)
    fingerprint = unread.fingerprint
    assert fingerprint == read_manifest(path).fingerprint
    assert list(unread) == list(read_manifest(path))
    assert len(unread) == 30
    assert unread[29].id == "i29"


def test_a_manifest_that_changes_between_two_readings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "a", "media": "x", "captions": "y"}\n')
    source = read_manifest(path)
    assert [item.id for item in source] == ["a"]
    path.write_text('{"id": "b", "media": "x", "captions": "y"}\n')
    with pytest.raises(UserError, match=r"m\.jsonl has changed while it was read"):
        list(source)


def test_reading_and_cutting_cost_little_more_than_json_does(tmp_path: Path) -> None:
    lines = []
    for n in range(3000):
        row = {
            "id": f"clip-{n:08d}",
            "media": f"clips/{n // 100:04d}/{n:08d}.mp4",
            "captions": ["a dog runs over the wet grass of a large park, seen from above", "x"],
            **({"start": n / 10, "end": n / 10 + 4} if n % 2 else {}),
        }
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "m.jsonl").write_text("".join(lines))
    key = PlanKey(source="m", manifest_sha256="0", items_per_shard=1000)

    def cut() -> None:
        Plan(tmp_path / "plan", 1000).write(read_manifest(tmp_path / "m.jsonl"), key)

    def bare() -> None:
        # Read twice, written once.
        for line in lines:
            json.loads(line)
            json.dumps(json.loads(line))

    def seconds(work) -> float:  # type: ignore[no-untyped-def]
        start = time.process_time()
        work()
        return time.process_time() - start

    ratios = [seconds(cut) / seconds(bare) for _ in range(5)]
    # Before it was done with care, the ratio was 10.
    assert min(ratios) < 7
