"""Tars, folders and remote addresses: the same items, wherever they lie."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from farm_media import WriteClip
from PIL import Image

from megatron_nuwa.decoders import DecodeError, DecodeLimits, DecodeSettings
from megatron_nuwa.errors import MachineError, UserError
from preprocessing.sources import (
    TarMember,
    decode_item,
    local_copy,
    media_name,
    read_manifest,
    read_source,
)

CLIP = DecodeSettings(image_size=32, frames=2, frames_per_second=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, write_clip: WriteClip) -> Path:
    """A folder of clips with captions, and one without, in two directories."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "sub").mkdir()
    (folder / ".hidden").mkdir()
    for number, name in enumerate(("a", "b", "sub/c")):
        write_clip(folder / f"{name}.mp4", [60 * number + 20 + 5 * k for k in range(8)])
    (folder / "a.txt").write_text("one\n\n two \n")
    tree = {"captions": ["three"], "start": 0.2, "end": 0.6, "provenance": "blip2"}
    (folder / "b.json").write_text(json.dumps(tree))
    (folder / "b.txt").write_text("not this one")
    Image.new("L", (8, 8)).save(folder / "b.sketch.png")
    (folder / ".hidden" / "d.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "README.md").write_text("about")
    return folder


def pack(folder: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.add(path, path.relative_to(folder).as_posix())
    return tar


def levels(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 5) * 5 for frame in frames]


def check_items(name: str | Path, prefix: str = "") -> None:
    source = read_source(name)
    items = [item for item in source if "README" not in item.id]
    assert [item.id for item in items] == [prefix + key for key in ("a", "b", "sub/c")]
    assert [item.captions for item in items] == [("one", "two"), ("three",), ()]
    assert [(item.start, item.end) for item in items] == [(None, None), (0.2, 0.6), (None, None)]
    assert [item.sketch is not None for item in items] == [False, True, False]
    assert [item.provenance for item in items] == [None, ("blip2",), None]
    assert [levels(decode_item(item, CLIP).frames) for item in items] == [
        *([20, 30], [90, 100], [140, 150])
    ]
    sketch = items[1].sketch
    assert sketch is not None
    with local_copy(sketch) as path:
        assert Image.open(path).size == (8, 8)
    again = pickle.loads(pickle.dumps(source))
    assert list(again) == list(source)
    assert read_source(name).fingerprint == source.fingerprint


def test_folder_of_media_with_sidecars(files: Path) -> None:
    check_items(files)
    source = read_source(files)
    assert media_name(source[2].media, source.folder) == "sub/c.mp4"


def test_names_in_a_folder_may_hold_dots_and_capitals(tmp_path: Path) -> None:
    for name in ("IMG.v2.JPG", "IMG.v3.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "IMG.v2.txt").write_text("a dot")
    (tmp_path / "IMG.v2.sketch.png").touch()
    items = list(read_source(tmp_path))
    assert [item.id for item in items] == ["IMG.v2", "IMG.v3"]
    assert items[0].captions == ("a dot",)
    assert items[0].sketch == tmp_path / "IMG.v2.sketch.png"


def test_tars_of_media_with_captions(files: Path, tmp_path: Path) -> None:
    tar = pack(files, tmp_path / "set-00.tar")
    check_items(tar, "set-00/")
    source = read_source(tar)
    readme = [item for item in source if "README" in item.id]
    with pytest.raises(DecodeError, match="has neither an image nor a video"):
        decode_item(readme[0], CLIP)
    pack(files, tmp_path / "set-01.tar")
    for name in (tmp_path, tmp_path / "set-{00..01}.tar"):
        both = read_source(name)
        assert len(both) == 2 * len(source)
        assert both.repeated_rows() == set()
    assert media_name(source[1].media, source.folder) == "tar://a.mp4::set-00.tar"


def test_many_tars_take_few_open_files(tmp_path: Path) -> None:
    for number in range(40):
        with tarfile.open(tmp_path / f"x-{number:03d}.tar", "w") as tar:
            for name, content in (("a.jpg", b"jpg"), ("a.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = read_source(tmp_path / "x-{000..039}.tar")
    assert [item.id for item in source] == [f"x-{number:03d}/a" for number in range(40)]
    places = [os.path.realpath(place) for place in Path("/proc/self/fd").iterdir()]
    assert sum(place.startswith(str(tmp_path)) for place in places) <= 16


def test_a_film_in_a_tar_is_copied_without_being_held(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(30_000_001)
    (tmp_path / "film.mp4").write_bytes(content)
    pack(tmp_path, tmp_path / "films.tar")
    (item,) = read_source(tmp_path / "films.tar")
    tracemalloc.start()
    with local_copy(item.media) as path:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert path.read_bytes() == content
    assert peak < 10_000_000


def test_a_disk_without_room_for_the_copy_is_no_items_fault(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "film.mp4").write_bytes(bytes(100_000))
    pack(tmp_path, tmp_path / "films.tar")
    (item,) = read_source(tmp_path / "films.tar")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(MachineError, match=r"TMPDIR\) /.* cannot be written: File too large"):
            local_copy(item.media).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_becomes_read_only_hides_no_error_behind_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "film.mp4").write_bytes(bytes(1000))
    pack(tmp_path, tmp_path / "films.tar")
    (item,) = read_source(tmp_path / "films.tar")

    def refused(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = os.unlink
    with pytest.raises(MachineError, match="told first"), local_copy(item.media) as path:  # noqa: PT012
        monkeypatch.setattr(os, "unlink", refused)
        raise MachineError("told first")
    monkeypatch.setattr(os, "unlink", before)
    shutil.rmtree(path.parent)


def test_members_of_a_tar_cannot_be_links_and_damage_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"link\.tar holds no items"):
        read_source(tmp_path / "link.tar")
    with tarfile.open(tmp_path / "cut.tar", "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 5000
            archive.addfile(info, io.BytesIO(bytes(5000)))
    content = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:7000])
    with pytest.raises(UserError, match=r"cut\.tar is damaged: unexpected end of data"):
        read_source(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", "{", r"a\.json: not valid JSON"),
        ("a.json", '{"start": -1}', r"a\.json: the field 'start' must be"),
        ("a.json", '{"captions": [3]}', r"a\.json: the field 'captions' must be"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8"),
    ],
)
def test_wrong_sidecar_is_named(
    tmp_path: Path, name: str, content: str | bytes, sentence: str
) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("notes.txt", "must be a folder, a .tar, or a manifest"),
        ("x.tar", r"x\.tar does not exist"),
        ("nothing://x/y.jsonl", "Protocol not known: nothing"),
        ("memory://none/x.jsonl", "does not exist"),
    ],
)
def test_what_is_no_source_is_named(tmp_path: Path, name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_source(name if "://" in name else tmp_path / name)


def upload(files: Path, address: str, **options: object) -> None:
    system, root = fsspec.core.url_to_fs(address, **options)
    system.makedirs(root, exist_ok=True)
    for path in sorted(files.rglob("*")):
        if path.is_file():
            system.pipe_file(f"{root}/{path.relative_to(files).as_posix()}", path.read_bytes())


def check_remote(files: Path, tmp_path: Path, address: str) -> None:
    upload(files, f"{address}/folder")
    check_items(f"{address}/folder")
    pack(files, tmp_path / "set-00.tar")
    rows = [
        {"id": "near", "media": "folder/a.mp4", "captions": "x"},
        {"id": "far", "media": f"{address}/folder/b.mp4", "captions": "x", "start": 0.2},
        {"id": "gone", "media": "folder/z.mp4", "captions": "x"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "m.csv").write_text("id,media,captions\nnear,folder/a.mp4,x\n")
    upload(tmp_path, address)
    check_items(f"{address}/set-00.tar", "set-00/")
    near, far, gone = read_source(f"{address}/m.jsonl")
    assert read_source(f"{address}/m.csv")[0].media == near.media
    assert levels(decode_item(near, CLIP).frames) == [20, 30]
    assert levels(decode_item(far, CLIP).frames) == [90, 100]
    with pytest.raises(DecodeError, match=rf"{address}/folder/z\.mp4 does not exist"):
        decode_item(gone, CLIP)
    with pytest.raises(DecodeError, match="is larger than the 1e-06 GiB"):
        decode_item(near, CLIP, DecodeLimits(download_gib=1e-6))
    local = read_source(tmp_path / "m.jsonl")
    assert local[1] == far
    assert media_name(near.media, f"{address}") == "folder/a.mp4"


def check_remote_parquet(files: Path, tmp_path: Path, address: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {
        "id": ["a", "b", "c"],
        "media": ["folder/a.mp4", f"{address}/folder/b.mp4", "folder/sub/c.mp4"],
        "captions": [["one", "two"], ["three"], []],
        "start": [None, 0.2, None],
        "end": [None, 0.6, None],
        "sketch": [None, "folder/b.sketch.png", None],
    }
    # Rows are found again in the second group, too.
    parquet.write_table(pyarrow.table(table), tmp_path / "m.parquet", row_group_size=2)
    upload(files, f"{address}/folder")
    upload(tmp_path, address)
    source = read_source(f"{address}/m.parquet")
    local = read_source(tmp_path / "m.parquet")
    assert source.fingerprint == local.fingerprint
    assert len(source) == len(local) == 3
    items = list(source)
    assert source[2] == items[2]
    assert [(item.id, item.captions, item.start, item.end) for item in items] == [
        (item.id, item.captions, item.start, item.end) for item in local
    ]
    assert [media_name(item.media, source.folder) for item in items] == [
        *("folder/a.mp4", "folder/b.mp4", "folder/sub/c.mp4")
    ]
    assert [levels(decode_item(item, CLIP).frames) for item in items] == [
        *([20, 30], [90, 100], [140, 150])
    ]
    assert items[1].sketch is not None
    with local_copy(items[1].sketch) as path:
        assert Image.open(path).size == (8, 8)
    assert list(pickle.loads(pickle.dumps(source))) == items
    assert list(read_source(f"{address}/m.parquet", checked=False)) == items
    upload_text(f"{address}/broken.parquet", "PAR1 no")
    for name, sentence in (
        ("broken", "is not a readable parquet file"),
        ("gone", "does not exist"),
    ):
        with pytest.raises(UserError, match=rf"{address}/{name}\.parquet {sentence}"):
            read_source(f"{address}/{name}.parquet")


def upload_text(address: str, text: str) -> None:
    system, path = fsspec.core.url_to_fs(address)
    system.pipe_file(path, text.encode())


def test_parquet_at_an_fsspec_address(files: Path, tmp_path: Path) -> None:
    check_remote_parquet(files, tmp_path, "memory://bucket/parquet")


def test_parquet_in_an_object_store(files: Path, tmp_path: Path, object_store: str) -> None:
    check_remote_parquet(files, tmp_path, object_store)


def test_fsspec_addresses(files: Path, tmp_path: Path) -> None:
    check_remote(files, tmp_path, "memory://bucket/set")


def test_object_store(files: Path, tmp_path: Path, object_store: str) -> None:
    check_remote(files, tmp_path, object_store)


def test_media_in_archives_are_read_through_their_addresses(tmp_path: Path) -> None:
    # Only the name says what this one is.
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "a.bmp", "a.bmp")
    with tarfile.open(tmp_path / "x.tar", "w") as outer:
        outer.add(tmp_path / "x.zip", "x.zip")
    for address in (
        f"zip://a.bmp::{tmp_path}/x.zip",
        f"simplecache::zip://a.bmp::{tmp_path}/x.zip",
        f"zip://a.bmp::tar://x.zip::{tmp_path}/x.tar",
    ):
        with local_copy(address) as path:
            assert path.suffix == ".bmp"
            assert path.read_bytes() == (tmp_path / "a.bmp").read_bytes()


def test_media_have_one_name_however_their_source_is_spelled(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(files, tmp_path / "x.tar")
    rows = [{"id": "0", "media": str(tmp_path / "x.png"), "captions": "x"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "folder" / "x.png")
    upload(tmp_path, "memory://spelled")
    monkeypatch.chdir(tmp_path)
    for name, alike in (
        ("x.png", ("m.jsonl", "./m.jsonl", f"{tmp_path}/m.jsonl")),
        ("x.png", ("folder", "folder/", f"{tmp_path}/folder")),
        ("x.png", ("memory://spelled/folder", "memory://spelled/folder/")),
        ("tar://a.mp4::x.tar", ("x.tar", f"{tmp_path}/x.tar", "memory://spelled/x.tar")),
    ):
        for spelling in alike:
            source = read_source(spelling)
            names = [media_name(item.media, source.folder) for item in source]
            assert name in names, spelling


def test_long_manifest_is_not_held(tmp_path: Path) -> None:
    held = []
    for rows in (1_000, 11_000):
        with (tmp_path / "long.jsonl").open("w") as stream:
            for number in range(rows):
                line = {"id": f"clip-{number:06d}", "media": "a.mp4", "captions": ["word " * 20]}
                stream.write(json.dumps(line) + "\n")
        tracemalloc.start()
        source = read_manifest(tmp_path / "long.jsonl")
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(source) == rows
    assert source[9_876].id == "clip-009876"
    assert source[-1].captions == ("word " * 20,)
    # Three numbers of eight bytes: 48 MB at 2 million lines.
    assert (held[1] - held[0]) / 10_000 < 32


def test_repeated_ids_are_found_in_later_rows(tmp_path: Path) -> None:
    names = ["a", "b", "a", "c", "b", "a"]
    lines = [json.dumps({"id": name, "media": "x", "captions": "y"}) + "\n" for name in names]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    assert read_manifest(tmp_path / "m.jsonl").repeated_rows() == {2, 4, 5}


def test_csv_rows_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(
        b'\xef\xbb\xbfid,media,captions\r\na,x,"two\r\nlines"\r\n\r\n\xc3\xa4,y,z\r\n'
    )
    source = read_manifest(tmp_path / "m.csv")
    assert [(item.id, item.captions) for item in source] == [
        ("a", ("two\r\nlines",)),
        ("ä", ("z",)),
    ]
    assert source[1].id == "ä"


def test_tar_member_reads_as_an_address() -> None:
    member = TarMember(Path("a/b.tar"), "x/y.jpg", "./x/y.JPG", 0, 1)
    assert str(member) == "tar://./x/y.JPG::a/b.tar"


@pytest.mark.parametrize(
    ("raw_name", "name"),
    [
        ("x/Y.jpg", "x/Y.jpg"),
        ("./x/Y.jpg", "x/Y.jpg"),
        ("x/Y.JPG", "x/Y.jpg"),
        ("./Y.Jpg", "Y.jpg"),
        ("./x/Y", "x/Y"),
    ],
)
def test_members_are_found_at_their_addresses_whatever_they_are_called(
    raw_name: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "content").write_bytes(b"of a picture")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "content", raw_name)
    (item,) = read_source(tmp_path / "a.tar")
    assert item.id == f"a/{name.removesuffix('.jpg')}"
    assert media_name(item.media, tmp_path) == f"tar://{name}::a.tar"
    for media in (item.media, str(item.media)):
        with local_copy(media) as path:
            assert path.read_bytes() == b"of a picture"
