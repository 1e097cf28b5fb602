"""What the farm is told beside its source: who wrote captions, what decoding may cost, by what."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents

from megatron_nuwa.data.corpus import Corpus
from preprocessing.__main__ import main


def test_captions_keep_their_writers_from_the_manifest_to_the_corpus(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writers: list[object] = [["original", "blip2", None], "blip2", None]
    rows: list[dict[str, object]] = [
        {"id": n, "media": str(media / f"image{n}.png"), "captions": CAPTIONS, "provenance": by}
        for n, by in enumerate(writers)
    ]
    manifest = write_manifest(tmp_path / "images.jsonl", rows)
    output = tmp_path / "corpus"
    assert main(tokenize_command(manifest, output, tools)) == 0
    corpus = Corpus(output)
    found = [corpus.item(n).get("provenance") for n in range(3)]
    assert found == [["original", "blip2", None], ["blip2"] * 3, None]
    assert main(["verify", str(output), "--full"]) == 0
    capsys.readouterr()
    assert main(["stats", str(output)]) == 0
    told = capsys.readouterr().out
    for part in ("blip2: 4 (44.4%)", "original: 1 (11.1%)", "unknown: 4 (44.4%)"):
        assert part in told


def test_a_corpus_is_the_same_however_its_source_is_spelled(
    media: Path, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, object]] = [
        {"id": n, "media": str(media / f"image{n}.png"), "captions": CAPTIONS} for n in range(2)
    ]
    manifest = write_manifest(media / "spelled.jsonl", rows)
    monkeypatch.chdir(media)
    for number, source in enumerate((manifest, manifest.name)):
        assert main(tokenize_command(source, tmp_path / str(number), tools)) == 0
    assert contents(tmp_path / "0") == contents(tmp_path / "1")
    assert Corpus(tmp_path / "1").item(0)["media"] == "image0.png"


def test_limits_of_decoding_can_be_raised_for_what_failed(
    media: Path, tools: Path, tmp_path: Path
) -> None:
    row: dict[str, object] = {"id": "0", "media": str(media / "clip0.mp4"), "captions": CAPTIONS}
    image = {**row, "id": "1", "media": str(media / "clip1.mp4")}
    manifest = write_manifest(tmp_path / "clips.jsonl", [row, image])
    clips = ["--frames", "2", "--fps", "5", "--attempts", "1"]
    command = tokenize_command(manifest, tmp_path / "corpus", tools, *clips)
    assert main([*command, "--decode-seconds", "0.0001"]) == 2
    assert main([*command, "--decode-memory-gib", "0.001"]) == 2
    assert not (tmp_path / "corpus").exists()
    assert main(command) == 0
    assert len(Corpus(tmp_path / "corpus")) == 2


def test_the_item_that_says_what_a_corpus_is_of_costs_no_more_than_others(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("clip0.mp4", "image0.png"):
            tar.add(media / name, name)
    command = tokenize_command(tmp_path / "x.tar", tmp_path / "corpus", tools)
    assert main([*command, "--download-gib", "1e-7"]) == 2
    told = capsys.readouterr().err
    assert "not one media file of the manifest can be read; the first: tar://clip0.mp4" in told
    assert "is larger than the" in told


def test_a_medium_of_no_known_kind_is_named_as_its_source_names_it(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"file://{tmp_path / 'x.doc'}"
    (tmp_path / "x.doc").write_bytes(b"no picture")
    row = {"id": "a", "media": address, "captions": ["a"]}
    manifest = write_manifest(tmp_path / "manifest.jsonl", [row])
    assert main(tokenize_command(manifest, tmp_path / "corpus", tools)) == 2
    assert f"the first: {address} " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--decode-seconds", "--decode-memory-gib", "--download-gib"])
def test_limits_must_be_positive(
    media: Path, tools: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tokenize_command(media / "none.jsonl", tmp_path / "corpus", tools, name, "0")
    assert main(command) == 2
    assert f"{name} must be above 0, not 0" in capsys.readouterr().err


def test_the_other_decoder_is_part_of_the_settings(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    row: dict[str, object] = {"id": "0", "media": str(media / "clip0.mp4"), "captions": CAPTIONS}
    manifest = write_manifest(tmp_path / "clips.jsonl", [row])
    for name in ("ffmpeg", "pyav"):
        command = tokenize_command(manifest, tmp_path / name, tools, "--frames", "2", "--fps", "5")
        assert main([*command, "--decoder", name]) == 0
    tars = [(tmp_path / name / "shard-000000.tar").read_bytes() for name in ("ffmpeg", "pyav")]
    assert tars[0] == tars[1]
    settings = json.loads((tmp_path / "pyav" / "settings.json").read_text())
    assert settings["decode"]["backend"] == "pyav"
    assert main(command) == 2
    assert "was begun with backend = pyav, and now it is ffmpeg" in capsys.readouterr().err
