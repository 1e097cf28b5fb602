"""Manifests in three formats, and sentences for wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_nuwa.errors import UserError
from preprocessing.sources import SourceItem, read_manifest


def test_three_formats_give_the_same_items(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"id": "a", "media": "x/a.mp4", "captions": ["one, two", "three"], '
        '"start": 1, "end": 2.5, "provenance": ["original", null]}\n'
        "\n"
        '{"id": 7, "media": "/abs/b.png", "captions": "vier", "sketch": "b.npy", "label": 3, '
        '"provenance": "blip2"}\n'
        '{"id": "c", "media": "c.png", "captions": ["x", "y"], "provenance": "original"}\n',
        encoding="utf-8",
    )
    (tmp_path / "m.csv").write_text(
        "id,media,captions,start,end,sketch,label,provenance\r\n"
        'a,x/a.mp4,"[""one, two"", ""three""]",1,2.5,,,"[""original"", null]"\r\n'
        "7,/abs/b.png,vier,,,b.npy,3,blip2\r\n"
        'c,c.png,"[""x"", ""y""]",,,,,original\r\n',
        encoding="utf-8-sig",
    )
    table = {
        "id": ["a", "7", "c"],
        "media": ["x/a.mp4", "/abs/b.png", "c.png"],
        "captions": [["one, two", "three"], ["vier"], ["x", "y"]],
        "start": [1.0, None, None],
        "end": [2.5, None, None],
        "sketch": [None, "b.npy", None],
        "provenance": [["original", None], ["blip2"], ["original", "original"]],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "m.parquet")
    expected = [
        SourceItem(
            *("a", tmp_path / "x/a.mp4", ("one, two", "three"), 1.0, 2.5),
            provenance=("original", None),
        ),
        SourceItem(
            *("7", Path("/abs/b.png"), ("vier",)),
            sketch=tmp_path / "b.npy",
            provenance=("blip2",),
        ),
        SourceItem(*("c", tmp_path / "c.png", ("x", "y")), provenance=("original", "original")),
    ]
    for name in ("m.jsonl", "m.csv", "m.parquet"):
        assert list(read_manifest(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: must be a JSON object"),
        ('{"id": "b", "media": "b.png"}', "line 2: the field 'captions' is missing"),
        ('{"id": "b", "media": "b.png", "caption": "x"}', r"\(is 'caption' meant\?\)"),
        ('{"id": "b", "media": 3, "captions": "x"}', "line 2: the field 'media' must be"),
        ('{"id": "\\ud800", "media": "b", "captions": "x"}', "'id' is not valid Unicode"),
        ('{"id": true, "media": "b.png", "captions": "x"}', "line 2: the field 'id' must be"),
        ('{"id": "b", "media": "b.png", "captions": [1]}', "line 2: the field 'captions' must be"),
        ('{"id": "b", "media": "b", "captions": "x", "start": -1}', "the field 'start' must be"),
        ('{"id": "b", "media": "b", "captions": "x", "end": "soon"}', "the field 'end' must be"),
        ('{"id": "b", "media": "b", "captions": "x", "start": NaN}', "the field 'start' must be"),
        ('{"id": "b", "media": "b", "captions": "x", "start": 2, "end": 2}', "later than 'start'"),
        ('{"id": "b", "media": "b", "captions": "x", "provenance": 1}', "'provenance' must be"),
        ('{"id": "b", "media": "b", "captions": "x", "provenance": " "}', "'provenance' must be"),
        (
            '{"id": "b", "media": "b", "captions": "x", "provenance": ["a", "b"]}',
            "each of the 1 captions",
        ),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "a", "media": "a.png", "captions": ["x"]}\n' + line + "\n")
    with pytest.raises(UserError, match=sentence) as caught:
        read_manifest(manifest)
    assert f"manifest {manifest}, line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("m.txt", b"", "must end in .jsonl, .csv or .parquet"),
        ("m.jsonl", b"", "holds no items"),
        ("m.jsonl", b"\xff\xfe", "is not UTF-8 text"),
        ("m.csv", b"id,media,captions\na,b.png,x,y\n", "line 2: has more values"),
        ("m.csv", b"id,media\na,b.png\n", "line 2: the field 'captions' is missing"),
        ("m.csv", b'id,media,captions\na,b.png,"[1"\n', "starts like a JSON list"),
        ("m.csv", b'id,media,captions\na,"b.png,x\n', "unexpected end of data"),
        ("m.parquet", b"PAR1 no", "is not a readable parquet file"),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_manifest(tmp_path / name)
    assert name in str(caught.value)


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        read_manifest(tmp_path / "nowhere.jsonl")


def test_bad_captions_are_left_to_the_farm(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "a", "media": "a.png", "captions": ["", "x"]}\n' * 2)
    assert [item.captions for item in read_manifest(tmp_path / "m.jsonl")] == [("", "x")] * 2


@pytest.mark.parametrize(
    ("name", "value", "shot"),
    [
        ("a#3", 3, 3),
        ("a#3", "3", 3),
        ("a#3", 4, None),
        ("a", 3, None),
        ("a#close-up", "close-up", None),
        ("a#True", True, None),
        ("a#1.5", 1.5, None),
        ("a#" + "9" * 5000, "9" * 5000, None),
        ("a#3", None, None),
    ],
)
def test_shots_are_known_by_their_number_and_their_id(
    name: str, value: object, shot: int | None, tmp_path: Path
) -> None:
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"id": name, "media": "a.mp4", "captions": "x", "shot": value})
    )
    (item,) = read_manifest(tmp_path / "m.jsonl")
    assert item.shot == shot
    assert item.uncut_id == (name if shot is None else "a")


def test_three_formats_know_shots(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"id": "a#1", "media": "a", "captions": "x", "shot": 1}\n'
        '{"id": "b", "media": "a", "captions": "x"}\n'
    )
    (tmp_path / "m.csv").write_text("id,media,captions,shot\na#1,a,x,1\nb,a,x,\n")
    table = {"id": ["a#1", "b"], "media": ["a"] * 2, "captions": ["x"] * 2, "shot": [1, None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "m.parquet")
    for name in ("m.jsonl", "m.csv", "m.parquet"):
        assert [item.shot for item in read_manifest(tmp_path / name)] == [1, None], name
