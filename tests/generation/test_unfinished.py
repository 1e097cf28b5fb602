"""Calls that fail or are cut short: what they leave, and what they say of it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from helpers import ROOT

from megatron_nuwa.errors import MachineError, UserError
from megatron_nuwa.generation import outputs, tasks
from megatron_nuwa.generation.media import write_gif, write_mp4

PROMPT, OTHER = "a red square moves left", "a blue circle stays"


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Interruption:
    """Ends the sampler with an error when a number of batches is done."""

    def __init__(self, batches: int, error: BaseException) -> None:
        self._left, self._error = batches, error

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self._left:
            raise self._error
        self._left -= 1
        return tasks.generate(*arguments, **named)


def listed(folder: Path) -> list[dict]:
    return json.loads((folder / "samples.json").read_text())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), RuntimeError("a defect")])
def test_a_call_that_is_cut_short_leaves_the_samples_that_it_has_finished(
    call,
    command: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(command, "generate", Interruption(2, error))
    with pytest.raises(type(error)):
        call("t2v", "--prompt", PROMPT, "--samples", 7, "--batch-size", 2, "--output", output)
    assert capsys.readouterr().err.endswith(f"4 of 7 clips are there, whole, in {output}\n")
    files = {f"000{number}.{kind}" for number in range(4) for kind in ("gif", "mp4")}
    assert contents(output) == files | {"samples.json", "index.html"}
    assert [entry["seed"] for entry in listed(output)] == [0, 1, 2, 3]
    assert {name for entry in listed(output) for name in entry["files"]} == files
    for number in range(4):
        assert imageio_ffmpeg.count_frames_and_secs(str(output / f"000{number}.mp4"))[0] == 3
    page = (output / "index.html").read_text()
    assert "4 of 7 clips of 16" in page
    assert re.findall(r'href="(\d+\.mp4)"', page) == [f"000{number}.mp4" for number in range(4)]


def test_samples_are_listed_as_soon_as_their_batch_is_done(
    call, command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, seen = tmp_path / "out", []

    def generate(*arguments: Any, **named: Any) -> Any:
        if (output / "samples.json").exists():
            seen.append([name for entry in listed(output) for name in entry["files"]])
            assert all((output / name).exists() for name in seen[-1])
        return tasks.generate(*arguments, **named)

    monkeypatch.setattr(command, "generate", generate)
    call("t2i", "--prompt", PROMPT, "--samples", 5, "--batch-size", 2, "--output", output)
    assert seen == [[f"000{number}.png" for number in range(count)] for count in (2, 4)]
    assert contents(output) == {
        *(f"000{number}.png" for number in range(5)),
        *("index.html", "samples.json", "sheet.png"),
    }


def test_earlier_samples_stay_until_all_of_the_new_ones_are_there(
    call, command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    call("t2i", "--prompt", PROMPT, "--samples", 3, "--output", output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    new = ("t2i", "--prompt", OTHER, "--samples", 2, "--batch-size", 1, "--output", output)
    with monkeypatch.context() as context:
        context.setattr(command, "generate", Interruption(1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            call(*new)
    unfinished = output / "unfinished"
    assert contents(unfinished) == {"0000.png", "samples.json", "index.html"}
    assert [entry["prompt"] for entry in listed(unfinished)] == [OTHER]
    assert contents(output) == {*before, "unfinished"}
    assert all((output / name).read_bytes() == content for name, content in before.items())
    call(*new)
    assert [entry["prompt"] for entry in listed(output)] == [OTHER, OTHER]
    assert contents(output) == {*before, "unfinished"} - {"0002.png"}
    assert (output / "0000.png").read_bytes() == (unfinished / "0000.png").read_bytes()


def test_of_many_candidates_only_the_kept_ones_are_written_prompt_by_prompt(
    call, command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brightness:
        def scores(self, pixels: np.ndarray, prompts: list[str]) -> list[float]:
            assert len(prompts) == 3 * len(set(prompts))
            return [float(sample.mean()) for sample in pixels]

    monkeypatch.setattr(command.ClipRanker, "load", lambda *_: Brightness())
    output = tmp_path / "out"
    words = ("t2i", "--prompt", PROMPT, "--prompt", OTHER, "--best-of", 3, "--batch-size", 2)
    words += ("--clip-weights", "clip.safetensors", "--output", output)
    call(*words)
    whole = listed(output)
    assert len(whole) == 2
    shutil.rmtree(output)
    # Two batches hold the candidates of the first prompt, and one of the second's.
    monkeypatch.setattr(command, "generate", Interruption(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        call(*words)
    assert listed(output) == whole[:1]
    assert contents(output) == {"0000.png", "samples.json", "index.html"}


def test_a_full_disk_is_named_with_what_is_missing(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = tmp_path / "out", outputs.write_png

    def write_png(path: Path, *arguments: Any) -> None:
        if path.name == "0003.png":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *arguments)

    monkeypatch.setattr(outputs, "write_png", write_png)
    with pytest.raises(UserError) as caught:
        call("t2i", "--prompt", PROMPT, "--samples", 5, "--batch-size", 2, "--output", output)
    assert re.fullmatch(
        rf"no space is left for {output}: the 3 samples that are missing take about 0\.0\d MB; "
        rf"2 of 5 images are there, whole, in {output}",
        str(caught.value),
    )
    assert contents(output) == {"0000.png", "0001.png", "samples.json", "index.html"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_full_disk_is_one_to_every_writer(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"clip.{suffix}"
    file.symlink_to("/dev/full")
    write = {"mp4": write_mp4, "gif": write_gif}[suffix]
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(file, noise, 8.0, {})
    assert caught.value.errno == errno.ENOSPC


def test_a_call_that_is_told_to_end_keeps_what_it_has(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "launch/generate.py", "t2i", "--run", run, "--output", output]
    command += ["--prompt", PROMPT, "--samples", "1000", "--batch-size", "4"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(word) for word in command], cwd=ROOT, **pipes) as process:
        while not (output / "samples.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    count = len(listed(output))
    assert 0 < count < 1000
    assert said == f"{count} of 1000 images are there, whole, in {output}\n"
    assert len(contents(output)) == count + len({"samples.json", "index.html"})


def test_an_ffmpeg_that_cannot_be_started_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    with pytest.raises(MachineError, match=r"ffmpeg \(/.*\) cannot be started: No such file"):
        write_mp4(tmp_path / "clip.mp4", np.zeros((2, 16, 16, 3), np.uint8), 5.0, {})
    assert not (tmp_path / "clip.mp4").exists()
