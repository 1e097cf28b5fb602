"""What stands behind the local page: frames as they arrive, and drawings as requests."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_tasks import CLIP, PICTURE, request, sample

from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.app import drawing, pictures, stream
from megatron_nuwa.generation.app.pictures import Arriving
from megatron_nuwa.generation.app.stream import Progress
from megatron_nuwa.generation.given import read_given
from megatron_nuwa.generation.palette import classes_of, colour_names, coloured, colours
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.tasks import Request, task_named
from megatron_nuwa.generation.trained import Generator
from megatron_nuwa.grid import Grid

PLAIN = SamplingSettings()


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """Have the sampler take so long a token; returns a list that grows by one each."""
    tokens: list[int] = []
    generate = stream.generate

    def counted(*arguments: object, on_token: Callable[[], None], **named: object) -> torch.Tensor:
        def slow() -> None:
            tokens.append(1)
            time.sleep(seconds)
            on_token()

        return generate(*arguments, on_token=slow, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "generate", counted)
    return tokens


def test_frames_arrive_one_by_one_and_are_those_of_the_sampler(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, 0.01)
    requests = [request("t2v", 1), request("t2v", 2)]
    seen = list(stream.stream(generator, requests, PLAIN))
    counts = [progress.frames.shape[1] for progress in seen]
    assert counts == sorted(counts)
    assert set(counts) >= {1, 2, 3}
    assert seen[-1].cells == seen[-1].wanted_cells == 48
    expected = generator.pixels(sample(generator, *requests), Grid(4, 4, 3))
    assert np.array_equal(seen[-1].frames, expected)


def test_a_slow_page_is_shown_the_newest_and_not_the_past(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_SECONDS", 0.0)
    slowed(monkeypatch, 0.01)
    seen = []
    for progress in stream.stream(generator, [request("t2v")], PLAIN):
        seen.append(progress.cells)
        time.sleep(0.1)
    # 48 tokens in about half a second, told one by one.
    assert len(seen) < 24
    assert seen[-1] == 48


def test_frames_are_shown_although_they_come_faster_than_they_are_decoded(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, 0.002)
    decode = Generator.pixels

    def slowly(*arguments: Any) -> np.ndarray:
        time.sleep(0.1)
        return decode(*arguments)

    monkeypatch.setattr(Generator, "pixels", slowly)
    counts = {p.frames.shape[1] for p in stream.stream(generator, [request("t2v")], PLAIN, 12)}
    assert len(counts - {0, 12}) >= 2


def test_a_frame_is_made_into_a_picture_once(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(frames: np.ndarray, frames_per_second: float) -> str:
        made.append(frames)
        return f"data:{len(made)}"

    monkeypatch.setattr(pictures, "address", counted)
    clips = np.zeros((2, 3, 16, 16, 3), np.uint8)
    arriving = Arriving([request("t2v", 1), request("t2v", 2)], 4.0)
    shown = [
        arriving.show(Progress(clips[:, :count], 3, cells, 48))
        for cells, count in enumerate((0, 0, 1, 1, 3, 3))
    ]
    assert [text is None for text in shown] == [False, True, False, True, False, True]
    assert len(made) == 6
    assert str(shown[0]).count("<span></span>") == 6
    # The newest of each sample, and the strips below them.
    assert str(shown[4]).count("data:") == 2 + 6
    assert "<span></span>" not in str(shown[4])


def test_a_longer_video_arrives_to_its_end(generator: Generator) -> None:
    last = list(stream.stream(generator, [request("t2v")], PLAIN, 7))[-1]
    assert last.frames.shape[:2] == (1, last.wanted_frames) == (1, 7)
    assert last.cells == last.wanted_cells == 7 * 16


def test_what_is_wrong_is_said_before_anything_is_generated(generator: Generator) -> None:
    with pytest.raises(UserError, match="at most 77"):
        next(stream.stream(generator, [request("t2i", prompt="word " * 90)], PLAIN))


def test_a_failure_of_the_sampler_reaches_the_page(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(stream, "generate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        list(stream.stream(generator, [request("t2i")], PLAIN))


def test_nobody_waiting_ends_the_sampling(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = slowed(monkeypatch, 0.05)
    arriving = stream.stream(generator, [request("t2v")], PLAIN)
    assert isinstance(next(arriving), Progress)
    arriving.close()
    assert len(tokens) < 48


def drawing_of(background: np.ndarray | None, painted: np.ndarray | None) -> drawing.Drawing:
    layers = []
    if painted is not None:
        layer = np.zeros((*painted.shape, 4), np.uint8)
        layer[painted] = (255, 45, 120, 255)
        layers.append(layer)
    return {"background": background, "layers": layers, "composite": background}


def read(generator: Generator, name: str, **parts: object) -> Request:
    given = {"prompt": "a red square", "picture": None, "clip": None, "sketch": None}
    fields = {**given, "keep_frames": 1, "frames": 3, **parts}
    return drawing.read_request(generator, task_named(name), 3, **fields)  # type: ignore[arg-type]


def test_a_painted_picture_becomes_its_fitted_pixels_and_region(generator: Generator) -> None:
    picture = drawing.enlarged(PICTURE[0])
    painted = np.zeros(picture.shape[:2], bool)
    painted[200:210, 250:384] = True
    made = read(generator, "ti2i", picture=drawing_of(picture, painted))
    assert made.prompt == "a red square"
    assert made.pixels is not None
    assert made.region is not None
    assert made.pixels.shape == (1, 16, 16, 3)
    # 384 pixels for 16: row 8 is painted, from column 10 on.
    expected = np.zeros((1, 16, 16), bool)
    expected[0, 8, 10:] = True
    assert np.array_equal(made.region, expected)


def test_a_clip_is_read_at_the_models_rate(generator: Generator, media: Path) -> None:
    made = read(generator, "v2v", clip=media / "clip.mp4", keep_frames=2)
    assert made.prompt == "None"
    assert made.pixels is not None
    assert made.pixels.shape == (2, 16, 16, 3)
    painted = np.ones((384, 384), bool)
    painted[:, :200] = False
    both = drawing_of(None, painted)
    assert read(generator, "tv2v", clip=media / "clip.mp4", picture=both).pixels.shape[0] == 3  # type: ignore[union-attr]
    assert drawing.first_frame(generator, media / "clip.mp4").shape == (384, 384, 3)
    assert CLIP.shape[0] == 3


def write_clip(path: Path, *output: str, size: str = "64x96") -> Path:
    source = f"testsrc2=size={size}:rate=8:duration=1"
    command = [ffmpeg_program(), "-v", "error", "-f", "lavfi", "-i", source]
    subprocess.run([*command, *output, path], check=True)
    return path


def test_page_and_command_make_the_same_pixels_of_a_picture(
    generator: Generator, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 4), dtype=np.uint8)
    pixels[:8, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "logo.png")
    whole = np.ones((24, 30), bool)
    made = read(generator, "i2i", picture=drawing_of(pixels, whole)).pixels
    given = read_given(tmp_path / "logo.png", "image", (16, 16), 1, 8.0)
    assert np.array_equal(made, given.frames)  # type: ignore[arg-type]
    assert (given.frames[0, 0] == 255).all()


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("wide-pixels.mp4", ("-vf", "setsar=2/1")),
        ("late.mkv", ("-vf", "setpts=PTS+1/TB", "-c:v", "ffv1")),
        ("drawn.gif", ()),
    ],
)
def test_page_and_command_make_the_same_pixels_of_a_clip(
    generator: Generator, tmp_path: Path, name: str, output: tuple[str, ...]
) -> None:
    path = write_clip(tmp_path / name, *output)
    made = read(generator, "v2v", clip=path, keep_frames=2).pixels
    given = read_given(path, "clip", (16, 16), 2, 8.0)
    assert np.array_equal(made, given.frames)  # type: ignore[arg-type]
    width = 128 if "wide" in name else 64
    assert given.shape == (96, width)


def test_the_page_refuses_the_clips_that_the_command_refuses(
    generator: Generator, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / "wide.mp4", size="160x32")
    with pytest.raises(UserError, match=r"^wide.mp4 is 160 × 32 pixels: .* cut away"):
        read(generator, "v2v", clip=path, keep_frames=2)


def test_a_drawn_sketch_becomes_the_classes_of_its_colours(generator: Generator) -> None:
    maps = np.random.default_rng(1).integers(0, 5, (16, 16)).astype(np.uint8)
    canvas = drawing.enlarged(coloured(maps, 5))
    soft = np.clip(canvas.astype(int) + 9, 0, 255).astype(np.uint8)
    both = {"background": canvas, "layers": [], "composite": soft}
    made = read(generator, "s2i", sketch=both)
    assert made.sketch is not None
    assert np.array_equal(made.sketch[0], maps)
    assert (drawing.blank_sketch(16) == coloured(np.zeros((1, 1), int), 5)).all()


def test_what_an_uploaded_sketch_leaves_transparent_is_class_0(generator: Generator) -> None:
    maps = np.random.default_rng(1).integers(1, 5, (16, 16)).astype(np.uint8)
    there = np.random.default_rng(2).random((16, 16)) < 0.5
    alpha = np.where(there, 255, 0).astype(np.uint8)[..., None]
    # Programs leave white, black or what was there before under what is transparent.
    pixels = np.where(there[..., None], coloured(maps, 5), 255).astype(np.uint8)
    canvas = drawing.enlarged(np.concatenate([pixels, alpha], axis=-1))
    whole = {"background": canvas, "layers": [], "composite": canvas}
    made = read(generator, "s2i", sketch=whole)
    assert made.sketch is not None
    assert np.array_equal(made.sketch[0], np.where(there, maps, 0))


def test_colours_tell_classes_apart() -> None:
    assert len(set(colours(64))) == 64
    assert len(colour_names(64)) == 64
    maps = np.arange(60).reshape(6, 10)
    assert np.array_equal(classes_of(coloured(maps, 60), 60), maps)


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("i2i", {}, "upload a picture first"),
        ("i2i", {"picture": drawing_of(None, None)}, "upload a picture first"),
        ("i2i", {"picture": drawing_of(PICTURE[0], None)}, "paint over what is to be made new"),
        ("i2i", {"picture": drawing_of(PICTURE[0, :9], None)}, "16 × 9 pixels, and the model"),
        ("v2v", {}, "upload a video first"),
        ("v2v", {"clip": Path("gone.mp4")}, "^gone.mp4 does not exist"),
        ("s2i", {}, "draw a sketch first"),
    ],
)
def test_what_is_missing_is_asked_for(
    generator: Generator, name: str, parts: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(generator, name, **parts)


def test_a_clip_that_is_too_short_is_named(generator: Generator, media: Path) -> None:
    faster = replace(generator, frames_per_second=2.0)
    with pytest.raises(UserError, match=r"^clip.mp4 has 2 frames at 2 frames a second, and 3"):
        read(faster, "v2v", clip=media / "clip.mp4", keep_frames=3)
