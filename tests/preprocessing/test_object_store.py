"""Sources and corpora in an object store: a local server that speaks S3."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents

from megatron_nuwa.data.cache import ShardCache
from megatron_nuwa.data.corpus import Corpus
from preprocessing.__main__ import main


def test_a_corpus_is_made_from_an_object_store_and_read_from_one(
    media: Path, tools: Path, tmp_path: Path, object_store: str
) -> None:
    store = fsspec.filesystem("s3")
    rows: list[dict[str, object]] = [
        {"id": n, "media": f"media/image{n}.png", "captions": CAPTIONS} for n in range(6)
    ]
    rows.append({"id": "gone", "media": "media/gone.png", "captions": CAPTIONS})
    for number in range(6):
        name = f"media/image{number}.png"
        store.pipe_file(f"{object_store}/{name}", (media / f"image{number}.png").read_bytes())
    manifest = write_manifest(tmp_path / "images.jsonl", rows)
    store.pipe_file(f"{object_store}/images.jsonl", manifest.read_bytes())
    (tmp_path / "filters.yaml").write_text("filters: [{name: minimum_size, pixels: 30}]\n")

    def tokenize(source: str, output: Path) -> dict[str, bytes]:
        more = ("--items-per-shard", "4", "--attempts", "1", "--filters", tmp_path / "filters.yaml")
        assert main(tokenize_command(source, output, tools, *more)) == 0
        return contents(output)

    remote = tokenize(f"{object_store}/images.jsonl", tmp_path / "remote")
    (failure,) = map(json.loads, remote["failures.jsonl"].splitlines())
    assert failure["reason"].startswith(f"{object_store}/media/gone.png")
    (tmp_path / "media").symlink_to(media)
    local = tokenize(str(manifest), tmp_path / "local")
    tars = [name for name in local if name.endswith(".tar")]
    assert len(tars) == 2
    assert all(remote[name] == local[name] for name in tars)

    for name, content in remote.items():
        store.pipe_file(f"{object_store}/corpus/{name}", content)
    here = Corpus(tmp_path / "remote")
    there = Corpus(f"{object_store}/corpus", ShardCache(tmp_path / "cache", 1 << 20))
    assert len(there) == 6
    for index in range(6):
        np.testing.assert_array_equal(there.visual(index), here.visual(index))
        assert there.item(index) == here.item(index)
