"""ffmpeg and PyAV give the same frames, and each policy does what it says."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from farm_media import WriteClip
from hostile_images import scan_bomb
from PIL import Image

from launch.demo.catalogue import load_catalogue
from launch.workflow.media import find_package_file
from megatron_nuwa.config import parse_settings
from megatron_nuwa.decoders import (
    DecodeError,
    DecodeSettings,
    decode_clip,
    decode_image,
    decode_media,
    guard,
)
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import UserError

LEVELS = [20 + 10 * k for k in range(20)]
VIDEOS = [(video.package, video.path) for video in load_catalogue().videos]


def real_video(package: str, path: str) -> Path:
    try:
        return find_package_file(package, path)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("package", "path"), VIDEOS, ids=[path for _, path in VIDEOS])
def test_both_backends_give_the_same_pixels_of_real_clips(package: str, path: str) -> None:
    pytest.importorskip("av")
    video = real_video(package, path)
    for start, end, fit in ((None, None, "crop"), (1.3, None, "native"), (2.0, 3.1, "crop")):
        made = [
            decode_clip(
                video,
                DecodeSettings(
                    image_size=64, frames=8, short_clips="pad", fit=fit, backend=backend
                ),
                start,
                end,
            )
            for backend in ("ffmpeg", "pyav")
        ]
        assert made[0][1] == made[1][1]
        # Both use the same filters of ffmpeg with its bit-exact flags, so no difference is allowed.
        np.testing.assert_array_equal(made[0][0], made[1][0])


@pytest.mark.parametrize("backend", ["ffmpeg", "pyav"])
def test_short_clip_is_sampled_faster(tmp_path: Path, write_clip: WriteClip, backend: str) -> None:
    if backend == "pyav":
        pytest.importorskip("av")
    clip = write_clip(tmp_path / "clip.mp4", LEVELS)
    settings = DecodeSettings(image_size=32, frames=10, short_clips="faster", backend=backend)
    decoded = decode_media(clip, settings)
    # 2 s hold 5 frames at 2.5 a second, and 10 at 5.
    assert (decoded.real, decoded.frames_per_second) == (10, 5.0)
    shown = [round((float(frame.mean()) - 20) / 10) for frame in decoded.frames]
    assert shown == list(range(0, 20, 2))
    decoded = decode_media(clip, settings, 0.5, 1.5)
    assert (decoded.real, decoded.frames_per_second) == (10, 10.0)
    shown = [round((float(frame.mean()) - 20) / 10) for frame in decoded.frames]
    assert shown == list(range(5, 15))
    with pytest.raises(DecodeError, match=r"has only 4 frames between 0\.5 and 0\.9 s at any rate"):
        decode_media(clip, settings, 0.5, 0.9)


def test_native_aspect_keeps_the_longer_side(tmp_path: Path, write_clip: WriteClip) -> None:
    settings = DecodeSettings(image_size=32, frames=2, fit="native")
    clip = write_clip(tmp_path / "clip.mp4", LEVELS, 10, (128, 60))
    assert decode_clip(clip, settings)[0].shape == (2, 32, 64, 3)
    Image.new("RGB", (60, 128)).save(tmp_path / "tall.png")
    image = decode_image(tmp_path / "tall.png", settings)
    assert image.shape == (1, 64, 32, 3)
    with pytest.raises(UserError, match="must be a multiple of side_multiple"):
        parse_settings(DecodeSettings, {"image_size": 30, "fit": "native"}, "recipe")


def test_fingerprints_of_older_corpora_hold() -> None:
    settings = DecodeSettings(image_size=32, frames=4)
    assert settings.fingerprint().startswith("1e610801bc7c2756")
    assert settings.fingerprint() != settings.model_copy(update={"fit": "native"}).fingerprint()
    assert settings.fingerprint() != settings.model_copy(update={"backend": "pyav"}).fingerprint()


def test_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    settings = DecodeSettings(image_size=8)
    guard.end_workers()
    for moment in ("idle", "busy"):
        decode_media(tmp_path / "a.png", settings)
        worker = guard._take()
        guard._idle.put(worker)
        if moment == "idle":
            worker._process.kill()
            worker._process.wait()
        else:
            bomb = scan_bomb(tmp_path / "scans.jpg", 3000)
            threading.Timer(0.5, worker._process.send_signal, [signal.SIGSEGV]).start()
            with pytest.raises(DecodeError, match=r"scans\.jpg crashes its decoder"):
                decode_media(bomb, settings)
        assert decode_media(tmp_path / "a.png", settings).real == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("kills", "good"), [(2, True), (3, False)])
def test_worker_that_is_killed_says_nothing_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, good: bool, number: int
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    settings = DecodeSettings(image_size=8)
    ask, killed = guard._Worker.ask, []

    def struck(worker: guard._Worker, *request: Any) -> Any:
        if len(killed) < kills:
            killed.append(worker.process_id)
            os.kill(worker.process_id, number)
        return ask(worker, *request)

    monkeypatch.setattr(guard._Worker, "ask", struck)
    if good:
        assert decode_media(tmp_path / "a.png", settings).real == 1
    else:
        with pytest.raises(DecodeError, match=r"a\.png crashes its decoder"):
            decode_media(tmp_path / "a.png", settings)
    assert len(set(killed)) == kills


@pytest.mark.parametrize(("deaths", "good"), [(2, True), (3, False)])
def test_worker_that_is_killed_while_it_starts_says_nothing_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, good: bool
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    settings = DecodeSettings(image_size=8)
    guard.end_workers()
    read_line, started = guard._Worker._read_line, []

    def struck(worker: guard._Worker, deadline: float) -> bytes:
        if worker.process_id not in started:
            started.append(worker.process_id)
            if len(started) <= deaths:
                os.kill(worker.process_id, signal.SIGKILL)
        return read_line(worker, deadline)

    monkeypatch.setattr(guard._Worker, "_read_line", struck)
    if good:
        assert decode_media(tmp_path / "a.png", settings).real == 1
    else:
        with pytest.raises(DecodeError, match=r"a\.png cannot be decoded: no decoder starts"):
            decode_media(tmp_path / "a.png", settings)
    assert len(started) == 3
    for process in started[:deaths]:
        # Nothing is left of them, not even an entry of the system.
        assert not Path(f"/proc/{process}").exists()


# Instead of ffmpeg: is killed a number of times, and then does its work.
KILLED = """#!/bin/sh
for n in $(seq {kills}); do
    if mkdir "{folder}/$n" 2>/dev/null; then kill -KILL $$; fi
done
exec "{ffmpeg}" "$@"
"""


@pytest.mark.parametrize(("kills", "good"), [(2, True), (3, False)])
def test_ffmpeg_that_is_killed_says_nothing_of_the_file(
    tmp_path: Path,
    write_clip: WriteClip,
    monkeypatch: pytest.MonkeyPatch,
    kills: int,
    good: bool,
) -> None:
    clip = write_clip(tmp_path / "a.mp4", [0, 60, 120, 180])
    settings = DecodeSettings(image_size=16, frames=2, frames_per_second=5)
    expected = decode_media(clip, settings).frames
    program = tmp_path / "ffmpeg"
    ffmpeg = ffmpeg_program()
    program.write_text(KILLED.format(kills=kills, folder=tmp_path, ffmpeg=ffmpeg))
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    if good:
        np.testing.assert_array_equal(decode_media(clip, settings).frames, expected)
    else:
        with pytest.raises(DecodeError, match=r"a\.mp4 .*ffmpeg was killed \(SIGKILL\), 3 times"):
            decode_media(clip, settings)


# A process that holds as many files as a loader of thousands of shards, and then decodes.
MANY_FILES = """
import os, resource, sys
from pathlib import Path
from megatron_nuwa.decoders import DecodeError, DecodeLimits, DecodeSettings, decode_media, guard

resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
while os.open(os.devnull, os.O_RDONLY) < 1100:
    pass
image, bomb = map(Path, sys.argv[1:])
settings = DecodeSettings(image_size=8)
print(decode_media(image, settings).frames.shape)
print(guard._take()._process.stdout.fileno())
try:
    decode_media(bomb, settings, limits=DecodeLimits(seconds=0.5))
except DecodeError as error:
    print(error)
"""


def test_a_process_with_more_than_1024_open_files_decodes(tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2048:
        pytest.skip("this machine allows a process fewer than 2,048 files")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    bomb = scan_bomb(tmp_path / "scans.jpg", 3000)
    command = [sys.executable, "-c", MANY_FILES, str(tmp_path / "a.png"), str(bomb)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shape, descriptor, refusal = done.stdout.splitlines()
    assert shape == "(1, 8, 8, 3)"
    assert int(descriptor) > 1024
    assert refusal == f"{bomb} took longer than 0.5 s to decode"
