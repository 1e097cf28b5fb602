"""Filters in the farm: counted, not failures, and the same corpus whatever happens on the way."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from farm_media import CAPTIONS, WriteClip, tokenize_command, write_manifest
from farm_runs import Moment, contents, kill_farm, run_farm, start_farm
from PIL import Image

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shards import read_manifest
from preprocessing import decode_worker, duplicates, farm
from preprocessing.__main__ import main
from preprocessing.state import FarmFolder

PICTURES = 6
SHARDS = 6
# Which picture each of the 30 rows shows, as another file; the first of each stays.
SHOWN = [n % PICTURES if n % 4 == 0 else PICTURES + n for n in range(30)]
ORIGINALS = [row for row in range(30) if SHOWN[row] not in SHOWN[:row]]


class Killed(BaseException):
    """The end of a process at a bad moment."""


def arguments(manifest: Path, output: Path, tools: Path, filters: Path, *more: str) -> list[str]:
    return tokenize_command(
        manifest, output, tools, "--filters", filters, "--items-per-shard", "5", *more
    )


def write_filters(path: Path, **settings: object) -> Path:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 pictures with copies among them in other sizes, and `alike.jsonl`."""
    folder = tmp_path_factory.mktemp("alike")
    rows: list[dict[str, object]] = []
    for row, shown in enumerate(SHOWN):
        coarse = np.random.default_rng(shown).integers(0, 256, (8, 8, 3), np.uint8)
        side = 64 if row in ORIGINALS else 96
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{row}.png")
        rows.append({"id": row, "media": f"{row}.png", "captions": CAPTIONS[: 1 + row % 3]})
    write_manifest(folder / "alike.jsonl", rows)
    write_filters(folder / "alike.yaml", near_duplicates={"distance": 4})
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    alike: Path, tools: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "corpus"
    command = arguments(alike / "alike.jsonl", output, tools, alike / "alike.yaml")
    assert main(command) == 0
    assert main(["verify", str(output), "--full"]) == 0
    return contents(output)


def test_filters_are_counted_apart_from_failures(
    media: Path,
    tools: Path,
    write_clip: WriteClip,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_clip(tmp_path / "flat.mp4", [20 * k for k in range(8)], 10, (96, 24))
    rows: list[dict[str, object]] = [
        {"id": n, "media": str(media / f"clip{n}.mp4"), "captions": CAPTIONS} for n in range(4)
    ]
    rows.append({"id": "wordy", "media": str(media / "clip5.mp4"), "captions": "a b c d e f g h"})
    rows.append({"id": "flat", "media": "flat.mp4", "captions": CAPTIONS})
    rows.append({"id": "corrupt", "media": str(media / "corrupt.mp4"), "captions": CAPTIONS})
    rows[3].update(start=0.2, end=0.5)
    manifest = write_manifest(tmp_path / "clips.jsonl", rows)
    filters = write_filters(
        tmp_path / "filters.yaml",
        filters=[
            {"name": "caption_length", "most": 7},
            {"name": "aspect_ratio", "largest": 2},
            {"name": "minimum_size", "pixels": 32},
            {"name": "duration", "shortest": 0.35},
        ],
    )
    output = tmp_path / "corpus"
    command = arguments(manifest, output, tools, filters, "--frames", "3", "--fps", "10")
    command = [part for part in command if part != "--no-report"]
    assert main(command) == 0
    told = capsys.readouterr().out
    counts = read_manifest(output).counts
    assert counts.items == 3
    assert counts.failed == 1
    assert counts.left_out == {"aspect_ratio": 1, "caption_length": 1, "duration": 1}
    for name, count in counts.left_out.items():
        assert f"left out by {name}: {count}" in told
    lines = [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]
    assert {line["id"]: line.get("filter") for line in lines} == {
        "3": "duration",
        "wordy": "caption_length",
        "flat": "aspect_ratio",
        "corrupt": None,
    }
    page = FarmFolder(output).report.read_text(encoding="utf-8")
    for name in counts.left_out:
        assert f"left out by the filter {name}" in page
    assert main(["verify", str(output), "--full"]) == 0
    capsys.readouterr()
    assert main(["stats", str(output)]) == 0
    assert "aspect_ratio: 1" in capsys.readouterr().out

    other = write_filters(tmp_path / "other.yaml", filters=[])
    assert main(arguments(manifest, output, tools, other, "--frames", "3", "--fps", "10")) == 2
    assert "was begun with filters = " in capsys.readouterr().err


def test_what_filters_left_out_is_not_tried_again(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [
        {"id": n, "media": str(media / f"image{n}.png"), "captions": CAPTIONS[:1] * (n + 1)}
        for n in range(3)
    ]
    rows[1]["captions"] = "one word too many for this filter"
    manifest = write_manifest(tmp_path / "images.jsonl", rows)
    rule = {"name": "caption_length", "most": 6}
    filters = write_filters(tmp_path / "filters.yaml", filters=[rule])
    command = arguments(manifest, tmp_path / "corpus", tools, filters)
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--retry-failed"]) == 0
    assert "is finished already" in capsys.readouterr().out


def test_no_item_left_is_no_corpus(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, object] = {"id": 1, "media": str(media / "image0.png"), "captions": CAPTIONS}
    manifest = write_manifest(tmp_path / "images.jsonl", [row])
    rule = {"name": "minimum_size", "pixels": 999}
    filters = write_filters(tmp_path / "filters.yaml", filters=[rule])
    assert main(arguments(manifest, tmp_path / "corpus", tools, filters)) == 2
    assert "filter 'minimum_size': item '1'" in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()


def test_the_first_of_those_that_look_alike_stays(
    alike: Path, tools: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in undisturbed.items():
        (tmp_path / name).write_bytes(content)
    corpus = Corpus(tmp_path)
    assert [int(corpus.item(n)["id"]) for n in range(len(corpus))] == ORIGINALS
    assert corpus.manifest.counts.left_out == {"near_duplicates": 30 - len(ORIGINALS)}
    lines = undisturbed["failures.jsonl"].decode().splitlines()
    for failure in map(json.loads, lines):
        assert failure.keys() == {"id", "reason", "filter"}
        original = SHOWN.index(SHOWN[int(failure["id"])])
        assert failure["reason"].endswith(f"looks like item '{original}'")
    # The others have the tokens and captions that they have where nobody looks for likeness.
    rows = [json.loads(line) for line in (alike / "alike.jsonl").read_text().splitlines()]
    manifest = write_manifest(alike / "originals.jsonl", [rows[row] for row in ORIGINALS])
    none = write_filters(tmp_path / "none.yaml", filters=[])
    assert main(arguments(manifest, tmp_path / "plain", tools, none)) == 0
    plain = Corpus(tmp_path / "plain")
    for index in range(len(plain)):
        np.testing.assert_array_equal(plain.visual(index), corpus.visual(index))
        np.testing.assert_array_equal(plain.texts(index), corpus.texts(index))


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_near_duplicates_do_not_depend_on_the_ranks(
    alike: Path, tools: Path, undisturbed: dict[str, bytes], tmp_path: Path, ranks: int
) -> None:
    output = tmp_path / "corpus"
    done = run_farm(ranks, arguments(alike / "alike.jsonl", output, tools, alike / "alike.yaml"))
    assert done.returncode == 0, done.stderr
    assert contents(output) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_killed_farms_take_the_same_near_duplicates_out(
    alike: Path, tools: Path, undisturbed: dict[str, bytes], tmp_path: Path, ranks: int
) -> None:
    hits = 0
    for run in range(4):
        choose = random.Random(10 * ranks + run)
        output = tmp_path / f"corpus{run}"
        command = arguments(alike / "alike.jsonl", output, tools, alike / "alike.yaml")
        # At the last of these moments the shards are all there, and near-duplicates are looked for.
        moment = Moment.chosen(output, SHARDS + 1, choose)
        farm = start_farm(ranks, command, tmp_path / "log")
        moment.await_in(farm, output)
        hits += kill_farm(farm, output, choose.choice(("rank", "ranks")), choose)
        done = run_farm(ranks, command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert contents(output) == undisturbed, (ranks, run)
    assert hits >= 2


@pytest.mark.parametrize("written", range(4))
def test_a_farm_that_ends_while_it_takes_them_out_decodes_nothing_again(
    alike: Path,
    tools: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: int,
) -> None:
    output = tmp_path / "corpus"
    command = arguments(alike / "alike.jsonl", output, tools, alike / "alike.yaml")
    real, done = duplicates.write_shard, []

    def until_killed(*shard: object) -> object:
        if len(done) == written:
            raise Killed
        done.append(shard)
        return real(*shard)  # type: ignore[arg-type]

    decoded = []

    def counted(*request: object) -> object:
        decoded.append(request)
        return real_decode(*request)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "write_shard", until_killed)
        with pytest.raises(Killed):
            main(command)
    assert not (output / "corpus.json").exists()
    real_decode = decode_worker.decode_item
    monkeypatch.setattr(decode_worker, "decode_item", counted)
    assert main(command) == 0
    assert contents(output) == undisturbed
    # Of the shard only that was being replaced at that moment.
    assert len(decoded) == 5


def test_an_item_that_is_good_at_last_is_compared_with_all_others(
    alike: Path, tools: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    copy = tmp_path / "alike"
    shutil.copytree(alike, copy)
    good = (copy / "0.png").read_bytes()
    (copy / "0.png").write_bytes(good[:50])
    output = tmp_path / "corpus"
    command = arguments(copy / "alike.jsonl", output, tools, copy / "alike.yaml")
    assert main(command) == 0
    # Without it, its first copy was the original of the others.
    assert contents(output) != undisturbed
    assert str(SHOWN.index(SHOWN[0], 1)) in {
        Corpus(output).item(n)["id"] for n in range(len(Corpus(output)))
    }
    (copy / "0.png").write_bytes(good)
    assert main([*command, "--retry-failed"]) == 0
    assert contents(output) == undisturbed


def test_a_copy_of_a_copy_comes_back_when_the_first_of_them_is_good_at_last(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first looks like the second, the second like the third, the first unlike the third."""

    def hashes(frames: np.ndarray, _real: int | None = None) -> np.ndarray:
        return np.array([(1 << round(float(frames.mean()) / 25)) - 1], np.uint64)

    monkeypatch.setattr(decode_worker, "perceptual_hashes", hashes)
    rows: list[dict[str, object]] = []
    for row in range(3):
        Image.new("RGB", (64, 64), (row * 100,) * 3).save(tmp_path / f"{row}.png")
        rows.append({"id": str(row), "media": f"{row}.png", "captions": CAPTIONS[:1]})
    manifest = write_manifest(tmp_path / "chain.jsonl", rows)
    filters = write_filters(tmp_path / "chain.yaml", near_duplicates={"distance": 4})

    def command(output: str) -> list[str]:
        return arguments(manifest, tmp_path / output, tools, filters, "--items-per-shard", "1")

    def ids(output: str) -> list[str]:
        return [line["id"] for line in Corpus(tmp_path / output).lines()]

    assert main(command("undisturbed")) == 0
    assert ids("undisturbed") == ["0", "2"]
    good = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(good[:50])
    assert main(command("corpus")) == 0
    assert ids("corpus") == ["1"]
    (tmp_path / "0.png").write_bytes(good)
    assert main([*command("corpus"), "--retry-failed"]) == 0
    assert contents(tmp_path / "corpus") == contents(tmp_path / "undisturbed")


def test_a_copy_whose_original_has_failed_since_comes_back(
    alike: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shard was lost amid being rewritten, and then its medium could not be read."""
    copy = tmp_path / "alike"
    shutil.copytree(alike, copy)
    output = tmp_path / "corpus"
    command = arguments(copy / "alike.jsonl", output, tools, copy / "alike.yaml")
    assert main(command) == 0
    (output / "corpus.json").unlink()
    (output / "shard-000000.json").unlink()
    (copy / "0.png").write_bytes(b"nothing")
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "encoded again; repeat the command" in error
    assert main(command) == 0
    fresh = tmp_path / "fresh"
    assert main(arguments(copy / "alike.jsonl", fresh, tools, copy / "alike.yaml")) == 0
    assert contents(output) == contents(fresh)


def test_a_shard_that_goes_amid_the_work_is_no_silent_loss(
    alike: Path,
    tools: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "corpus"
    command = arguments(alike / "alike.jsonl", output, tools, alike / "alike.yaml")

    def lose(corpus: Path, *_: object) -> None:
        (corpus / "shard-000002.json").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(farm, "take_out_duplicates", lose)
        assert main(command) == 2
    assert "shard-000002.json has gone while the farm was at work" in capsys.readouterr().err
    assert not (output / "corpus.json").exists()
    assert main(command) == 0
    assert contents(output) == undisturbed
