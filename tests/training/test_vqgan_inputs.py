"""What launch/train_vqgan.py reads: manifests of millions of items, in many processes."""

from __future__ import annotations

import json
import pickle
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from vqgan_runs import train_here, write_recipe

from megatron_nuwa.decoders import DecodeError
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import FailedProcessError, MachineError, UserError
from megatron_nuwa.training import frames, processes
from megatron_nuwa.training.faults import read_faults
from megatron_nuwa.training.vqgan_recipe import VqganRecipe
from megatron_nuwa.training.vqgan_step import VqganStep
from preprocessing.sources import SourceItem, read_manifest

ROWS = 3000


@pytest.fixture(scope="module")
def command() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from launch import train_vqgan

        return train_vqgan


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures and their manifests."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    rows = []
    for number in range(8):
        shades = random.integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(shades).save(folder / f"{number}.png")
        rows.append({"id": str(number), "media": f"{number}.png", "captions": ["noise"]})
    for name, some in (("train", rows[2:]), ("held", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows in three formats; every third has a sketch, some have times."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    folder = tmp_path_factory.mktemp("manifests")
    rows: list[dict[str, Any]] = [
        {
            "id": f"item-{number}",
            "media": f"a/folder/{number:07d}.mp4",
            "captions": [f"a caption of a common length, which nothing needs, {number}"],
            "start": number / 8 if number % 2 else None,
            "sketch": f"{number}.png" if number % 3 == 0 else None,
        }
        for number in range(ROWS)
    ]
    paths = {kind: folder / f"rows.{kind}" for kind in ("jsonl", "csv", "parquet")}
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        f'{row["id"]},{row["media"]},"{row["captions"][0]}",{row["start"] or ""},'
        f"{row['sketch'] or ''}\n"
        for row in rows
    ]
    paths["csv"].write_text("id,media,captions,start,sketch\n" + "".join(lines))
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, paths["parquet"], row_group_size=500)
    return paths


def seen(item: SourceItem) -> tuple[object, ...]:
    return item.media, item.start, item.end, item.sketch


@pytest.mark.parametrize(("kind", "size"), [("jsonl", 30), ("csv", 30), ("parquet", 75)])
def test_an_item_costs_every_worker_a_few_bytes(
    kind: str, size: int, manifests: dict[str, Path], command: Any
) -> None:
    """Eight GPUs with twelve workers each hold them more than a hundred times."""
    items = command.ManifestItems([manifests[kind]])
    sent = pickle.dumps(items)
    # A parquet's rows cannot be found again by a place in the file, so whole paths are sent.
    path = len(str(manifests[kind].parent)) if kind == "parquet" else 0
    assert len(sent) < (size + path) * ROWS
    source = list(read_manifest(manifests[kind]))
    received = pickle.loads(sent)
    assert len(received) == ROWS
    assert [seen(item) for item in received] == [seen(item) for item in source]
    assert [seen(received[row]) for row in (7, 0, ROWS - 1)] == [
        seen(source[row]) for row in (7, 0, ROWS - 1)
    ]


def test_manifests_are_one_sequence_of_which_some_items_are_kept(
    manifests: dict[str, Path], command: Any
) -> None:
    items = command.ManifestItems(list(manifests.values()))
    whole = [item for path in manifests.values() for item in read_manifest(path)]
    assert [seen(item) for item in items] == [seen(item) for item in whole]
    for place in (0, ROWS - 1, ROWS, 2 * ROWS, 3 * ROWS - 1):
        assert seen(items[place]) == seen(whole[place])
    with pytest.raises(IndexError):
        items[3 * ROWS]
    items.keep(command._has_sketch)
    sketched = [item for item in whole if item.sketch is not None]
    assert len(items) == len(sketched) == ROWS
    assert [seen(item) for item in items] == [seen(item) for item in sketched]
    assert seen(items[ROWS - 1]) == seen(sketched[-1])
    assert len(pickle.dumps(items)) < 3 * ROWS * 70


def test_a_sketch_s_key_follows_the_files_and_the_rules(
    media: Path, tmp_path: Path, command: Any
) -> None:
    calls = []
    items = command.ManifestItems([media / "train.jsonl"])

    def key(rules: str = "r") -> str:
        return command._key(rules, items, command._describe_media, lambda: calls.append(1))

    before = key()
    assert key() == before
    assert len(calls) == 12
    assert key("s") != before
    picture = media / "2.png"
    picture.write_bytes(picture.read_bytes() + b"\0")
    assert key() != before


@pytest.mark.parametrize("classes", [None, 4], ids=["media", "sketches"])
def test_what_lies_at_an_address_is_decoded_and_named_as_a_file_is(
    classes: int | None, tmp_path: Path, command: Any
) -> None:
    shades = np.random.default_rng(0).integers(0, 4, (40, 40)).astype(np.uint8)
    Image.fromarray(shades).save(tmp_path / "a.png")
    if classes:
        np.save(tmp_path / "b.npy", np.stack([shades] * 8))
    else:
        source = ("-f", "lavfi", "-i", "testsrc=size=64x48:rate=8", "-t", "1")
        subprocess.run([ffmpeg_program(), "-v", "error", *source, tmp_path / "b.mp4"], check=True)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    names = ["a.png", "b.npy" if classes else "b.mp4", "broken.png", "absent.png"]
    column = "sketch" if classes else "media"

    def media(manifest: str, prefix: str) -> Any:
        rows = [
            {"id": name, "media": "any.png", "captions": ["x"], column: f"{prefix}{name}"}
            for name in names
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / manifest).write_text(text)
        recipe = VqganRecipe.model_validate(
            {
                "run": tmp_path / "run",
                "model": {"image_size": 32, "downsampling": 8, "classes": classes},
                "data": {"train": [tmp_path / manifest], "frames": 4},
                "loss": {
                    "perceptual_weight": 0,
                    "reconstruction": "cross_entropy" if classes else "l2",
                },
                "steps": 1,
                "batch_size": 2,
            }
        )
        return command.media_frames(recipe, recipe.data.train, "training frames")

    near, far = media("near.jsonl", ""), media("far.jsonl", f"file://{tmp_path}/")
    for place in (0, 1):
        expected = near.decode(near.items[place])
        assert np.array_equal(far.decode(far.items[place]), expected)
    for place in (2, 3):
        with pytest.raises(DecodeError, match=rf"^file://{tmp_path}/{names[place]} "):
            far.decode(far.items[place])


def test_files_are_looked_at_only_for_a_cache_and_one_loader_is_open_at_a_time(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, capfd: Any
) -> None:
    """The k-means start in the middle of the training has a loader of its own."""
    looks: list[object] = []
    opened: list[int] = []
    most: list[int] = []

    class Counted(frames.DataLoader):  # type: ignore[type-arg, name-defined]
        def __iter__(self) -> Any:
            opened.append(1)
            most.append(len(opened))
            try:
                yield from super().__iter__()
            finally:
                opened.pop()

    monkeypatch.setattr(frames, "DataLoader", Counted)
    monkeypatch.setattr(command, "_size_and_time", looks.append)
    data = {"cache_frames": False, "workers": 0, "held_out": []}
    small = {
        "codebook": {"start_step": 2, "kmeans_vectors": 64},
        "loss": {"perceptual_weight": 0, "adversarial_weight": 0},
    }
    recipe = write_recipe(tmp_path, media, data=data, steps=4, batch_size=2, **small)
    train_here(monkeypatch, recipe)
    assert looks == []
    assert most == [1, 1, 1]
    shown = capfd.readouterr().out
    lines = [line.split()[1].rstrip(":") for line in shown.splitlines() if line[:5] == "step "]
    assert lines == ["1/4", "2/4", "2", "3/4", "4/4"]
    train_here(monkeypatch, recipe, f"vqgan.run={tmp_path / 'b'}", "vqgan.data.cache_frames=true")
    assert len(looks) == 6


def test_a_fault_of_the_machine_while_decoding_costs_a_new_run_nothing(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, capfd: Any
) -> None:
    decode = command.FrameDecoder.__call__

    def fails(decoder: Any, item: SourceItem) -> Any:
        if item.id == "5":
            raise MachineError("no ffmpeg here")
        return decode(decoder, item)

    small = {"loss": {"perceptual_weight": 0, "adversarial_weight": 0}}
    recipe = write_recipe(tmp_path, media, data={"held_out": []}, steps=1, batch_size=2, **small)
    with monkeypatch.context() as patch:
        patch.setattr(command.FrameDecoder, "__call__", fails)
        with pytest.raises(MachineError, match=r"^no ffmpeg here$"):
            train_here(monkeypatch, recipe)
    train_here(monkeypatch, recipe)
    said = "training frames: decoded 6 frames of 6 items, 3 of them before this start in "
    shown = capfd.readouterr().out
    assert said in shown
    assert "left out" not in shown


def test_an_error_while_training_is_written_down(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    """Where launch/supervise.py finds it."""
    step = VqganStep.__call__

    def fails(state: VqganStep, number: int, images: Any) -> Any:
        if number == 1:
            raise ValueError("disturbed")
        return step(state, number, images)

    monkeypatch.setattr(VqganStep, "__call__", fails)
    small = {"loss": {"perceptual_weight": 0, "adversarial_weight": 0}}
    with pytest.raises(FailedProcessError):
        train_here(monkeypatch, write_recipe(tmp_path, media, steps=4, batch_size=2, **small))
    [fault] = read_faults(tmp_path / "run")
    assert (fault.step, fault.kind, fault.sentence) == (1, "error", "ValueError: disturbed")


def test_the_backend_waits_longer_than_the_watchdog(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[timedelta | None] = []

    def join(timeout: timedelta | None = None) -> None:
        asked.append(timeout)
        raise UserError("asked")

    monkeypatch.setattr(processes, "join_processes", join)
    recipe = write_recipe(tmp_path, media)
    for override, seconds in (("seed=1", 3600), ("training.hang_seconds=9000", 18000)):
        with pytest.raises(UserError, match="asked"):
            train_here(monkeypatch, recipe, override)
        assert asked.pop() == timedelta(seconds=seconds)
