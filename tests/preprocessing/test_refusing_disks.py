"""A disk that refuses ends the farm in one sentence; no item is to blame, no corpus is spoilt."""

from __future__ import annotations

import errno
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from disks import PAGE, MakeDisk
from farm_clips import clip_command
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_nuwa.decoders import DecodeLimits, DecodeSettings
from megatron_nuwa.errors import UserError
from preprocessing import attempts, duplicates
from preprocessing.__main__ import main
from preprocessing.attempts import Attempts, Journal, collect
from preprocessing.figures import Figures
from preprocessing.filters import FilterSettings
from preprocessing.isolation import Demands, decode_alone
from preprocessing.sources import SourceItem
from preprocessing.watch import Watch


def refusal(reason: int) -> OSError:
    return OSError(reason, os.strerror(reason))


def test_attempts_that_cannot_be_noted_end_the_farm_and_no_item(
    clip_manifest: Path,
    tools: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "corpus"
    command = clip_command(clip_manifest, output, tools)
    real, notes = os.pwrite, []

    def refusing(handle: int, content: bytes, offset: int) -> int:
        notes.append(offset)
        if len(notes) > 20:
            raise refusal(errno.EIO)
        return real(handle, content, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refusing)
        assert main(command) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"farm folder {output}.farm/attempts cannot be written: Input/output error" in told
    assert not (output / "corpus.json").exists()
    assert main(command) == 0
    assert contents(output) == undisturbed


def test_row_whose_number_is_cut_off_by_a_full_disk_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.begin(123456)
    real, room = os.pwrite, [3, 0]

    def nearly_full(handle: int, content: bytes, offset: int) -> int:
        left = room.pop(0)
        if not left:
            raise refusal(errno.ENOSPC)
        return real(handle, content[:left], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", nearly_full)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            journal.fail(123456)
    assert collect(tmp_path) == {123456: Attempts(deaths=1)}


@pytest.mark.parametrize("kind", ["tar", "address"])
def test_full_folder_for_temporary_files_ends_the_farm_and_no_item(
    media: Path,
    tools: Path,
    tmp_path: Path,
    memory_disk: MakeDisk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    source = tmp_path / f"images.{'tar' if kind == 'tar' else 'jsonl'}"
    names = [f"image{number}.png" for number in range(6)]
    if kind == "tar":
        (tmp_path / "caption.txt").write_text(CAPTIONS[0])
        with tarfile.open(source, "w") as tar:
            for name in names:
                tar.add(media / name, name)
                tar.add(tmp_path / "caption.txt", name.replace("png", "txt"))
    else:
        rows: list[dict[str, object]] = [
            {"id": name, "media": f"file://{media / name}", "captions": CAPTIONS[:1]}
            for name in names
        ]
        write_manifest(source, rows)
    output = tmp_path / "corpus"
    more = ("--frames", "1", "--items-per-shard", "2")
    command = tokenize_command(source, output, tools, *more)
    assert (media / names[0]).stat().st_size > PAGE
    disk = memory_disk(1)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(disk.folder))
        assert main(command) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"(TMPDIR) {disk.folder} cannot be written: No space left on device" in told
    assert not list(output.glob("shard-*"))
    assert list(disk.folder.iterdir()) == []
    assert main(command) == 0
    assert "6 items, 6 captions, 0 failed" in capsys.readouterr().out


def test_process_that_decodes_alone_tells_of_a_full_disk(
    media: Path, memory_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = memory_disk(1)
    monkeypatch.setenv("TMPDIR", str(disk.folder))
    item = SourceItem("x", f"file://{media / 'image0.png'}", tuple(CAPTIONS))
    demands = Demands(DecodeSettings(image_size=32), DecodeLimits(), FilterSettings())
    with pytest.raises(UserError, match=r"\(TMPDIR\) .* cannot be written: No space left"):
        decode_alone(item, demands)


def test_corpus_is_whole_though_nothing_can_be_tidied_up_behind_it(
    clip_manifest: Path,
    tools: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "corpus"
    forget = attempts.forget

    def refusing(folder: Path) -> None:
        if (output / "corpus.json").exists():
            raise refusal(errno.EROFS)
        forget(folder)

    monkeypatch.setattr(attempts, "forget", refusing)
    assert main(clip_command(clip_manifest, output, tools)) == 0
    assert contents(output) == undisturbed


def test_figures_that_cannot_be_written_cost_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tensorboard"
    folder.write_text("in the way")
    with Watch(20, 1, folder) as watch:
        for _ in range(3):
            watch._write_scalars()
        folder.unlink()
        watch.add(Figures(items=7))
    told = capsys.readouterr()
    assert told.out.count("figures are lost") == 1
    assert told.err == ""
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("farm/items")] == [(7, 7.0)]


def test_notes_on_near_duplicates_tell_why_the_disk_refuses(memory_disk: MakeDisk) -> None:
    disk = memory_disk(1)
    with pytest.raises(OSError, match="No space left on device"):
        duplicates._save(disk.folder / "hashes.npy", np.zeros(PAGE))
