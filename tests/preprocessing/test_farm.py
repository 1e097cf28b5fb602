"""The farm under one process and under real MPI ranks."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents, environment, mpirun, run_farm

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shards import read_sidecar
from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.decoders import DecodeLimits, DecodeSettings, decode
from megatron_nuwa.errors import MachineError
from megatron_nuwa.models.vqgan import load_vqgan
from preprocessing import decode_worker
from preprocessing.__main__ import main
from preprocessing.filters import FilterSettings
from preprocessing.isolation import Demands, Frames, decode_alone
from preprocessing.sources import read_manifest

CLIPS = ["--frames", "4", "--fps", "5"]


def clip_rows(broken: bool = True) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {"id": f"c{n}", "media": f"clip{n}.mp4", "captions": CAPTIONS[: n % 3 + 1]}
        for n in range(7)
    ]
    if broken:
        rows.insert(3, {"id": "bad", "media": "corrupt.mp4", "captions": CAPTIONS[:1]})
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, media: Path, tools: Path) -> Path:
    """A corpus of seven clips, with one more that is corrupt, in three shards; one process."""
    folder = tmp_path_factory.mktemp("corpora") / "clips"
    manifest = write_manifest(media / "clips.jsonl", clip_rows())
    command = tokenize_command(manifest, folder, tools, *CLIPS, "--items-per-shard", "3")
    assert main(command) == 0
    return folder


def test_corpus_is_byte_identical_for_one_two_and_three_ranks(
    corpus: Path, media: Path, tools: Path, tmp_path: Path
) -> None:
    expected = contents(corpus)
    for ranks in (1, 2, 3):
        output = tmp_path / f"ranks{ranks}"
        more = (*CLIPS, "--items-per-shard", "3")
        done = run_farm(ranks, tokenize_command(media / "clips.jsonl", output, tools, *more))
        assert done.returncode == 0, done.stderr
        assert contents(output) == expected
        assert "8/8" in done.stdout
        assert "7 items, 13 captions, 1 failed" in done.stdout


def test_tokens_are_those_of_the_vqgan_and_the_bpe(corpus: Path, media: Path, tools: Path) -> None:
    vqgan = load_vqgan(tools / "vqgan.safetensors")
    bpe = TextTokenizer.load(tools / "bpe.json")
    read = Corpus(corpus)
    assert read.grid == (4, 4, 4)
    assert read.manifest.frames_per_second == 5
    good = clip_rows(broken=False)
    assert [read.item(n)["id"] for n in range(len(read))] == [row["id"] for row in good]
    settings = DecodeSettings(image_size=32, frames=4, frames_per_second=5)
    tokens = []
    # The manifest's rows by shard, without the corrupt one: so many frames are encoded together.
    for shard in (good[:3], good[3:5], good[5:]):
        clips = [decode(media / str(row["media"]), settings)[0] for row in shard]
        images = torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            tokens.append(vqgan.encode(images.contiguous()).numpy())
    expected_visual = np.concatenate(tokens).reshape(7, 64)
    for index, row in enumerate(good):
        np.testing.assert_array_equal(read.visual(index), expected_visual[index])
        assert read.item(index)["captions"] == row["captions"]
        assert read.item(index)["media"] == row["media"]
        expected = [bpe.encode(caption) for caption in read.item(index)["captions"]]
        np.testing.assert_array_equal(read.texts(index), expected)


def test_corrupt_clip_is_recorded_and_counted(corpus: Path) -> None:
    failures = [json.loads(line) for line in (corpus / "failures.jsonl").read_text().splitlines()]
    assert [failure["id"] for failure in failures] == ["bad"]
    assert "corrupt.mp4 cannot be decoded as a video" in failures[0]["reason"]
    assert read_sidecar(corpus / "shard-000001.json").failures[0].id == "bad"
    assert Corpus(corpus).manifest.counts.failed == 1


def test_rerun_makes_only_what_is_missing(
    corpus: Path, media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "again"
    shutil.copytree(corpus, output)
    (output / "shard-000001.tar").unlink()
    (output / ".shard-000001.tar.torn").write_bytes(b"half a shard")
    kept = (output / "shard-000000.tar").stat().st_mtime_ns
    command = tokenize_command(
        media / "clips.jsonl", output, tools, *CLIPS, "--items-per-shard", "3"
    )
    assert main(command) == 0
    assert "1 shards" in capsys.readouterr().out
    assert contents(output) == contents(corpus)
    assert (output / "shard-000000.tar").stat().st_mtime_ns == kept
    assert main(command) == 0
    assert "is finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--items-per-shard", "2"], "was begun with items_per_shard = 3, and now it is 2"),
        (["--fps", "4"], "was begun with frames_per_second = 5.0, and now it is 4.0"),
        (["--long-captions", "truncate"], "was begun with long_captions = refuse"),
    ],
)
def test_rerun_with_other_settings_is_refused(
    corpus: Path,
    media: Path,
    tools: Path,
    change: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(corpus)
    base = [*CLIPS, "--items-per-shard", "3"]
    assert main(tokenize_command(media / "clips.jsonl", corpus, tools, *base, *change)) == 2
    assert sentence in capsys.readouterr().err
    assert contents(corpus) == before


def test_every_kind_of_bad_item_is_recorded_and_the_good_ones_go_on(
    media: Path, tools: Path, tmp_path: Path
) -> None:
    long = " ".join(["zebra"] * 40)
    rows: list[dict[str, object]] = [
        {"id": "good", "media": "image0.png", "captions": [CAPTIONS[0]]},
        {"id": "missing", "media": "nowhere.png", "captions": [CAPTIONS[0]]},
        {"id": "blank", "media": "image1.png", "captions": [CAPTIONS[0], "  \n"]},
        {"id": "mute", "media": "image1.png", "captions": []},
        {"id": "long", "media": "image1.png", "captions": [long]},
        {"id": "kind", "media": "clip0.mp4", "captions": [CAPTIONS[0]]},
        {"id": "good", "media": "image2.png", "captions": [CAPTIONS[0]]},
        {"id": "window", "media": "image2.png", "captions": [CAPTIONS[0]], "start": 1},
        {"id": "last", "media": "image3.png", "captions": [CAPTIONS[1]]},
    ]
    manifest = write_manifest(media / "mixed.jsonl", rows)
    output = tmp_path / "mixed"
    assert main(tokenize_command(manifest, output, tools, "--items-per-shard", "2")) == 0
    read = Corpus(output)
    assert [read.item(n)["id"] for n in range(len(read))] == ["good", "last"]
    assert read.grid == (4, 4, 1)
    assert read.manifest.frames_per_second is None
    lines = (output / "failures.jsonl").read_text().splitlines()
    reasons = {line["id"]: line["reason"] for line in map(json.loads, lines)}
    assert "nowhere.png does not exist" in reasons["missing"]
    assert "is empty" in reasons["blank"]
    assert "has no caption" in reasons["mute"]
    assert "at most 77 are allowed" in reasons["long"]
    assert "zebra zebra" in reasons["long"]
    assert "is a video, but images are asked for" in reasons["kind"]
    assert "stands in an earlier line" in reasons["good"]
    assert "cannot have 'start' or 'end'" in reasons["window"]
    # A shard of bad items alone has a sidecar, which keeps it from being tried again, but no tar.
    assert (output / "shard-000001.json").exists()
    assert not (output / "shard-000001.tar").exists()
    assert main(["verify", str(output), "--full"]) == 0


def test_long_captions_are_truncated_and_short_clips_padded_on_request(
    media: Path, tools: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"id": "c", "media": "clip2.mp4", "captions": [" ".join(["zebra"] * 40)], "end": 0.6}
    ]
    manifest = write_manifest(media / "short.jsonl", rows)
    more = [*CLIPS, "--short-clips", "pad", "--long-captions", "truncate"]
    assert main(tokenize_command(manifest, tmp_path / "padded", tools, *more)) == 0
    read = Corpus(tmp_path / "padded")
    bpe = TextTokenizer.load(tools / "bpe.json")
    assert read.item(0)["frames"] == 3
    visual = read.visual(0).reshape(4, 16)
    np.testing.assert_array_equal(visual[3], visual[2])
    assert read.texts(0)[0, 0] == bpe.start_id
    assert list(read.texts(0)[0]).index(bpe.end_id) == 76


def test_corpus_without_a_good_item_leaves_nothing(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"id": "bad", "media": "corrupt.mp4", "captions": ["a dog"]}]
    manifest = write_manifest(media / "bad.jsonl", rows)
    assert main(tokenize_command(manifest, tmp_path / "none", tools, *CLIPS)) == 2
    assert "all 1 items of" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--vqgan", "nowhere.safetensors"], "VQ-GAN nowhere.safetensors does not exist"),
        (["--bpe", "nowhere.json"], "BPE nowhere.json cannot be read"),
        (["--frames", "0"], "the arguments of tokenize: --frames must be at least 1, not 0"),
        (["--frames", "many"], "--frames must be a whole number, not many"),
        (["--fps", "-1"], "the arguments of tokenize: --fps must be above 0, not -1"),
        (["--fps", "nan"], "--fps must be a number, not nan"),
        (["--decode-ranks-per-encoder", "3"], "--decode-ranks-per-encoder 3 needs several ranks"),
        (["--frames", "1", "--fps", "2"], "--fps is given"),
    ],
)
def test_wrong_arguments_write_nothing(
    media: Path,
    tools: Path,
    tmp_path: Path,
    change: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = write_manifest(media / "arguments.jsonl", clip_rows())
    assert main(tokenize_command(manifest, tmp_path / "none", tools, *change)) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_foreign_output_folder_is_left_alone(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    manifest = write_manifest(media / "foreign.jsonl", clip_rows())
    assert main(tokenize_command(manifest, tmp_path, tools, *CLIPS)) == 2
    assert "is not a corpus" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_collector_passes_over_what_is_loaded_while_a_farm_works(
    media: Path, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_over = []
    decode_item = decode_worker.decode_item

    def watched(*arguments: Any) -> Frames:
        passed_over.append(gc.get_freeze_count())
        return decode_item(*arguments)

    monkeypatch.setattr(decode_worker, "decode_item", watched)
    manifest = write_manifest(media / "collector.jsonl", clip_rows(broken=False))
    command = tokenize_command(manifest, tmp_path / "corpus", tools, *CLIPS)
    assert main(command) == 0
    # PyTorch alone makes more objects.
    assert min(passed_over) > 100_000
    assert gc.get_freeze_count() == 0


def test_ffmpeg_that_cannot_be_started_is_no_items_fault(
    corpus: Path,
    media: Path,
    tools: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "corpus"
    more = (*CLIPS, "--items-per-shard", "3")
    command = tokenize_command(media / "clips.jsonl", output, tools, *more)
    with monkeypatch.context() as wrong:
        wrong.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
        assert main(command) == 2
        told = "cannot be started: No such file or directory\n"
        assert capsys.readouterr().err == f"error: ffmpeg ({tmp_path / 'ffmpeg'}) {told}"
        item = read_manifest(media / "clips.jsonl")[0]
        demands = Demands(
            DecodeSettings(image_size=16, frames=4, frames_per_second=5),
            DecodeLimits(),
            FilterSettings(),
        )
        with pytest.raises(MachineError, match="cannot be started"):
            decode_alone(item, demands)
    assert main(command) == 0
    assert contents(output) == contents(corpus)


def test_user_error_ends_all_ranks_with_one_line(media: Path, tools: Path, tmp_path: Path) -> None:
    done = run_farm(2, tokenize_command(tmp_path / "nowhere.jsonl", tmp_path / "none", tools))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "nowhere.jsonl" in line]
    assert lines == [f"error: manifest {tmp_path / 'nowhere.jsonl'} does not exist"]
    assert "Traceback" not in done.stderr


def test_defect_on_one_rank_aborts_the_job_instead_of_hanging(tmp_path: Path) -> None:
    script = tmp_path / "defect.py"
    script.write_text(
        "import sys\n"
        "from preprocessing.communicator import join_ranks, on_every_rank, run_ranks\n"
        "ranks = join_ranks()\n"
        "def work():\n"
        "    return on_every_rank(ranks, lambda: 1 // (1 - ranks.rank))\n"
        "sys.exit(run_ranks(ranks, work))\n"
    )
    done = subprocess.run(
        [*mpirun(2), sys.executable, script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("ZeroDivisionError") == 1
    assert "rank 1 of 2 failed" in done.stderr


def test_lone_process_does_not_load_mpi() -> None:
    code = "import preprocessing.__main__ as m, sys; m.join_ranks(); print('mpi4py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
