"""Frames of real media: which ones, which way up, and what is refused."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from farm_media import WriteClip
from PIL import Image

from megatron_nuwa.decoders import (
    DecodeError,
    DecodeLimits,
    DecodeSettings,
    backends,
    decode,
    decode_clip,
    decode_image,
    media_kind,
)
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program

LEVELS = [20 + 4 * k for k in range(50)]
CONTAINERS = {
    "mp4": ("-c:v", "libx264", "-g", "12", "-bf", "3"),
    "mkv": ("-c:v", "libx264", "-x264-params", "open-gop=1:keyint=12:bframes=3"),
    "ts": ("-c:v", "libx264", "-g", "12", "-bf", "2"),
    "avi": ("-c:v", "mpeg4", "-q:v", "2", "-g", "12"),
    "webm": ("-c:v", "libvpx-vp9", "-g", "12", "-deadline", "realtime", "-cpu-used", "8"),
}


def shown(frames: np.ndarray) -> list[int]:
    """Which of the clip's frames these are, by their grey level."""
    return [round((float(frame.mean()) - LEVELS[0]) / 4) for frame in frames]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, write_clip: WriteClip) -> dict[str, Path]:
    """The same 5 s at 10 frames a second in each container."""
    folder = tmp_path_factory.mktemp("clips")
    return {
        name: write_clip(folder / f"clip.{name}", LEVELS, 10, (64, 48), *codec)
        for name, codec in CONTAINERS.items()
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("rate", "start"), [(2.5, 0.0), (2.5, 0.4), (3, 1.23), (8, 2.05), (20, 3.51), (10, 4.0)]
)
def test_frame_k_is_the_one_shown_at_start_plus_k_over_f(
    clips: dict[str, Path], container: str, rate: float, start: float
) -> None:
    settings = DecodeSettings(image_size=32, frames=4, frames_per_second=rate)
    frames, real = decode_clip(clips[container], settings, start)
    expected = [math.floor((start + k / rate) * 10 + 1e-6) for k in range(4)]
    assert shown(frames) == expected
    assert real == 4


@pytest.mark.parametrize("container", CONTAINERS)
def test_entering_a_long_video_late_picks_the_same_frames(
    clips: dict[str, Path], container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "SEEK_LEAD_SECONDS", 1.5)
    settings = DecodeSettings(image_size=32, frames=5, frames_per_second=8)
    frames, _ = decode_clip(clips[container], settings, 3.81)
    assert shown(frames) == [math.floor((3.81 + k / 8) * 10) for k in range(5)]


def test_picture_held_since_before_the_entry_is_found(
    tmp_path: Path, write_clip: WriteClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "SEEK_LEAD_SECONDS", 0.5)
    slides = write_clip(tmp_path / "slides.mp4", LEVELS[:5], 0.5, (64, 48), "-g", "1")
    settings = DecodeSettings(image_size=32, frames=3, frames_per_second=10)
    assert shown(decode_clip(slides, settings, 3.8)[0]) == [1, 1, 2]


def test_window_ends_before_its_end(clips: dict[str, Path]) -> None:
    settings = DecodeSettings(image_size=32, frames=4, frames_per_second=10)
    assert shown(decode_clip(clips["mp4"], settings, 1.0, 1.4)[0]) == [10, 11, 12, 13]
    with pytest.raises(DecodeError, match=r"has 3 frames between 1 and 1\.3 s .* 4 are needed"):
        decode_clip(clips["mp4"], settings, 1.0, 1.3)


def test_short_clip_says_what_it_has_or_repeats_its_last_frame(clips: dict[str, Path]) -> None:
    skip = DecodeSettings(image_size=32, frames=15, frames_per_second=2.5)
    with pytest.raises(DecodeError, match=r"clip\.mp4 has 13 frames at 2\.5 .*15 are needed"):
        decode_clip(clips["mp4"], skip)
    pad = skip.model_copy(update={"short_clips": "pad"})
    frames, real = decode_clip(clips["mp4"], pad)
    assert (frames.shape, real) == ((15, 32, 32, 3), 13)
    np.testing.assert_array_equal(frames[13], frames[12])
    np.testing.assert_array_equal(frames[14], frames[12])
    with pytest.raises(DecodeError, match="has no video frame from 9 s on"):
        decode_clip(clips["mp4"], pad, 9.0)


@pytest.mark.parametrize("size", [(96, 32), (32, 96)])
def test_crop_is_the_centre_of_the_resized_frame(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 2] = 255
    rows, columns = (slice(None), slice(32, 64)) if width > height else (slice(32, 64), slice(None))
    pixels[rows, columns] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "bands.png")
    command = [ffmpeg_program(), "-v", "error", "-loop", "1", "-t", "1"]
    command += ["-i", str(tmp_path / "bands.png"), "-c:v", "ffv1", str(tmp_path / "bands.mkv")]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    image = decode_image(tmp_path / "bands.png", DecodeSettings(image_size=16))
    clip, _ = decode_clip(tmp_path / "bands.mkv", DecodeSettings(image_size=16, frames=2))
    for frames in (image, clip):
        inner = frames[:, 2:-2, 2:-2].astype(int)
        assert inner[..., 0].min() > 240
        assert inner[..., 2].max() < 15
    # Pillow and swscale resize with the same kernel, though not with the same arithmetic.
    assert np.abs(image[0].astype(int) - clip[0]).mean() < 4


def test_pixels_need_not_be_square(tmp_path: Path, write_clip: WriteClip) -> None:
    codec = ("-vf", "setsar=2/1", "-c:v", "libx264")
    path = write_clip(tmp_path / "wide.mp4", [90] * 5, 10, (32, 64), *codec)
    frames, _ = decode_clip(path, DecodeSettings(image_size=32, frames=2, frames_per_second=5))
    assert frames.shape == (2, 32, 32, 3)


def test_rotated_photograph_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :, 0] = 255
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    frame = decode_image(tmp_path / "turned.jpg", DecodeSettings(image_size=32))[0]
    assert frame[:14, :, 0].min() > 200
    assert frame[18:, :, 0].max() < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_white_paper(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:, 10:, 3] = 255
    image = Image.fromarray(pixels)
    path = tmp_path / "glass.png"
    image.quantize(4).save(path) if mode == "P" else image.convert(mode).save(path)
    frame = decode_image(path, DecodeSettings(image_size=20))[0]
    assert (frame[:, :10] == 255).all()
    assert (frame[:, 10:] == 0).all()


def test_modes_without_three_bytes_a_pixel_become_rgb(tmp_path: Path) -> None:
    settings = DecodeSettings(image_size=8)
    Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert (decode_image(tmp_path / "deep.png", settings) == 128).all()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red = decode_image(tmp_path / "print.jpg", settings)[0, 4, 4]
    assert red[0] > 240
    assert red[1:].max() < 15


def test_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    frame, real = decode(tmp_path / "two.gif", DecodeSettings(image_size=8))
    assert frame[0, 0, 0].tolist() == [255, 0, 0]
    assert real == 1


def test_truncated_image_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in (".jpg", ".png", ".webp"):
        path = tmp_path / f"cut{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DecodeError, match=f"cut{suffix} cannot be decoded as an image"):
            decode_image(path, DecodeSettings(image_size=32))


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (60, 60)).save(tmp_path / "bomb.png")
    # 3,600 pixels against a limit of 2,000: Pillow alone would only warn.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(DecodeError, match=r"bomb\.png cannot be decoded .*decompression bomb"):
        decode_image(tmp_path / "bomb.png", DecodeSettings(image_size=8))


@pytest.mark.parametrize("harm", ["truncated", "flipped", "headless"])
def test_corrupt_clip_is_refused(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "clip.mp4"
    command = [ffmpeg_program(), "-v", "error", "-nostdin", "-f", "lavfi"]
    command += ["-i", "testsrc2=s=160x120:r=25:d=4", "-c:v", "libx264", "-movflags", "+faststart"]
    subprocess.run([*command, str(path)], check=True)
    content = bytearray(path.read_bytes())
    if harm == "truncated":
        del content[len(content) // 2 :]
    elif harm == "headless":
        del content[:64]
    else:
        middle = len(content) // 2
        content[middle : middle + 300] = bytes(
            byte ^ 0xFF for byte in content[middle : middle + 300]
        )
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"clip\.mp4 cannot be decoded as a video") as caught:
        decode_clip(path, DecodeSettings(image_size=32, frames=10))
    assert "0x" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "playlist", ["#EXTM3U\n#EXTINF:5,\n{}\n", "ffconcat version 1.0\nfile {}\n"]
)
def test_playlist_cannot_open_other_files(
    clips: dict[str, Path], tmp_path: Path, playlist: str
) -> None:
    secret = tmp_path / "secret.ts"
    secret.write_bytes(clips["ts"].read_bytes())
    for name in ("list.mp4", "list.ts"):
        (tmp_path / name).write_text(playlist.format(secret.name))
        with pytest.raises(DecodeError, match="cannot be decoded as a video"):
            decode_clip(tmp_path / name, DecodeSettings(image_size=32, frames=4))


def test_slow_decoding_is_given_up(clips: dict[str, Path]) -> None:
    settings = DecodeSettings(image_size=32, frames=4)
    with pytest.raises(DecodeError, match=r"clip\.mp4 took longer than 0\.001 s"):
        decode_clip(clips["mp4"], settings, limits=DecodeLimits(seconds=0.001))


def test_sound_without_picture_is_no_clip(tmp_path: Path) -> None:
    command = [ffmpeg_program(), "-v", "error", "-nostdin", "-f", "lavfi"]
    subprocess.run([*command, "-i", "sine=d=1", str(tmp_path / "tone.mp4")], check=True)
    with pytest.raises(DecodeError, match=r"tone\.mp4 .*it holds no video stream$"):
        decode_clip(tmp_path / "tone.mp4", DecodeSettings(image_size=32, frames=2))


def test_content_decides_before_the_name(clips: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(clips["mp4"].read_bytes())
    assert media_kind(tmp_path / "a.jpg") == "clip"
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "b.png").rename(tmp_path / "b.mp4")
    assert media_kind(tmp_path / "b.mp4") == "image"
    (tmp_path / "c.txt").write_text("neither")
    with pytest.raises(DecodeError, match=r"c\.txt is neither an image nor a video"):
        media_kind(tmp_path / "c.txt")
    (tmp_path / "d.mp4").touch()
    with pytest.raises(DecodeError, match=r"d\.mp4 is empty"):
        media_kind(tmp_path / "d.mp4")


def test_kind_must_be_the_one_asked_for(clips: dict[str, Path], tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(DecodeError, match=r"clip\.mp4 is a video, but images are asked for"):
        decode(clips["mp4"], DecodeSettings(image_size=4))
    with pytest.raises(DecodeError, match=r"b\.png is an image, but clips of 2 frames"):
        decode(tmp_path / "b.png", DecodeSettings(image_size=4, frames=2))


def test_odd_file_names_are_only_names(clips: dict[str, Path], tmp_path: Path) -> None:
    settings = DecodeSettings(image_size=32, frames=2)
    for name in ("-i.mp4", "a:b,c'd.mp4", "http:x.mp4", "50%d ä.mp4"):
        (tmp_path / name).write_bytes(clips["mp4"].read_bytes())
        assert shown(decode_clip(tmp_path / name, settings)[0]) == [0, 4]


def test_fingerprint_changes_with_every_setting_that_matters() -> None:
    base = DecodeSettings(image_size=32, frames=4)
    others = [
        base.model_copy(update={"image_size": 64}),
        base.model_copy(update={"frames": 5}),
        base.model_copy(update={"frames_per_second": 5.0}),
        base.model_copy(update={"short_clips": "pad"}),
    ]
    assert len({settings.fingerprint() for settings in [base, *others]}) == 5
    image = DecodeSettings(image_size=32)
    assert image.fingerprint() == DecodeSettings(image_size=32, frames_per_second=9).fingerprint()
