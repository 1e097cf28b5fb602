"""Media files to square RGB frames: images by Pillow, clips by ffmpeg."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import warnings
from pathlib import Path
from typing import Literal

import ffmpeg
import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageOps
from pydantic import Field

from megatron_nuwa.config import Settings
from megatron_nuwa.errors import UserError

MediaKind = Literal["image", "clip"]

# Raised whenever the same file and settings would give other pixels than before.
DECODE_RULES_VERSION = 1
CLIP_TIMEOUT_SECONDS = 120.0
# A clip inside a long video is entered this much early, because containers without an exact index
# and codecs with leading pictures (MPEG-TS, HEVC) give their first frames up to a key frame late.
SEEK_LEAD_SECONDS = 12.0

# Containers that hold their own media. Playlists (HLS, DASH, concat) are left out because they
# name further files and addresses, which a hostile item could use to read what it should not.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,gif,h264,hevc,ivf,nut,mxf"

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".jp2", ".avif"),
)
CLIP_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts"),
    *(".flv", ".ogv", ".wmv", ".asf", ".mxf"),
)


class DecodeError(UserError):
    """A media file that cannot become frames; its text is one sentence that names the file."""


class DecodeSettings(Settings):
    """How media become frames: a square of `image_size` pixels, `frames` of them (1 = an image)."""

    image_size: int = Field(ge=1)
    frames: int = Field(default=1, ge=1)
    frames_per_second: float = Field(default=2.5, gt=0, allow_inf_nan=False)
    short_clips: Literal["skip", "pad"] = "skip"

    def fingerprint(self) -> str:
        """sha256 of everything that decides the pixels."""
        rules = {"rules": DECODE_RULES_VERSION, **self.model_dump(mode="json")}
        if self.frames == 1:
            # An image has neither a frame rate nor a length.
            del rules["frames_per_second"], rules["short_clips"]
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def decode(
    path: Path, settings: DecodeSettings, start: float | None = None, end: float | None = None
) -> tuple[np.ndarray, int]:
    """Frames uint8 (frames, H, W, 3) of an image or a clip, and how many of them are real.

    Raises `DecodeError` naming the file, also where its kind is not the one the settings ask for.
    """
    kind = media_kind(path)
    if settings.frames == 1:
        if kind != "image":
            raise DecodeError(f"{path} is a video, but images are asked for (frames = 1)")
        if start is not None or end is not None:
            raise DecodeError(f"{path} is an image, so it cannot have 'start' or 'end'")
        return decode_image(path, settings), 1
    if kind != "clip":
        raise DecodeError(
            f"{path} is an image, but clips of {settings.frames} frames are asked for"
        )
    return decode_clip(path, settings, start, end)


def media_kind(path: Path) -> MediaKind:
    """Whether a file is an image or a clip, by its first bytes or, if unknown, by its name.

    Raises `DecodeError` for a file that is missing, empty or neither.
    """
    head = _head(path)
    by_content = _kind_of_content(head)
    if by_content is not None:
        return by_content
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in CLIP_SUFFIXES:
        return "clip"
    raise DecodeError(f"{path} is neither an image nor a video of a known kind")


def decode_image(path: Path, settings: DecodeSettings) -> np.ndarray:
    """The image, upright, opaque and cropped to its central square: uint8 (1, H, W, 3).

    Alpha is laid over white; of an animation the first frame is taken. Raises `DecodeError`.
    """
    _head(path)
    size = (settings.image_size, settings.image_size)
    try:
        with warnings.catch_warnings():
            # Pillow only warns about images of suspicious size; a farm must not decode them.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                upright = ImageOps.exif_transpose(opened)
                square = ImageOps.fit(_opaque(upright), size, Image.Resampling.BICUBIC)
    # Broken bytes raise whatever the format's parser stumbles on: OSError, SyntaxError,
    # ValueError, struct.error, EOFError, IndexError and more.
    except Exception as error:
        raise DecodeError(f"{path} cannot be decoded as an image: {_one_line(error)}") from error
    return np.asarray(square, dtype=np.uint8)[None]


def decode_clip(
    path: Path,
    settings: DecodeSettings,
    start: float | None = None,
    end: float | None = None,
    timeout: float = CLIP_TIMEOUT_SECONDS,
) -> tuple[np.ndarray, int]:
    """The frames shown at `start + k / frames_per_second` seconds, before `end`, centre-cropped.

    Returns uint8 (frames, H, W, 3) and the number of real frames, which is smaller than `frames`
    only where short clips are padded with their last frame. Raises `DecodeError` for files that
    cannot be decoded without error, take longer than `timeout` seconds, or are too short.
    """
    _head(path)
    wanted = settings.frames
    if end is not None:
        # Rounded so that a window of exactly n steps does not gain one by a floating-point hair.
        steps = round((end - (start or 0.0)) * settings.frames_per_second, 6)
        wanted = min(wanted, math.ceil(steps))
    raw = _run_ffmpeg(path, settings, start or 0.0, wanted, timeout)
    frame_bytes = settings.image_size * settings.image_size * 3
    real, rest = divmod(len(raw), frame_bytes)
    if rest or real > wanted:
        raise DecodeError(f"{path} gave {len(raw)} bytes, which is not a number of whole frames")
    window = _window(start, end)
    if real == 0:
        raise DecodeError(f"{path} has no video frame{window}")
    frames = np.frombuffer(raw, np.uint8).reshape(real, settings.image_size, -1, 3)
    if real == settings.frames:
        return frames, real
    if settings.short_clips == "skip":
        raise DecodeError(
            f"{path} has {real} frames{window} at {settings.frames_per_second:g} frames a second, "
            f"and {settings.frames} are needed"
        )
    padding = np.repeat(frames[-1:], settings.frames - real, axis=0)
    return np.concatenate([frames, padding]), real


def _run_ffmpeg(
    path: Path, settings: DecodeSettings, start: float, wanted: int, timeout: float
) -> bytes:
    size = settings.image_size
    # The name is given as a file: address, so that no name can be taken for another protocol.
    options = {"protocol_whitelist": "file,pipe", "format_whitelist": CONTAINERS, "threads": 1}
    entry = max(0.0, start - SEEK_LEAD_SECONDS)
    if entry:
        options |= {"ss": f"{entry:.6f}", "noaccurate_seek": None}
    # Time stamps are kept as the file has them: shifting them by `entry` would round them.
    video = ffmpeg.input(f"file:{path.absolute()}", **options).video
    if start:
        # A time base as coarse as a frame (AVI) could not hold a time between two frames; it is
        # divided, not replaced, so that the frames' own times stay exact.
        video = video.filter("settb", "if(gt(intb,0.00001),intb/1000,intb)")
        video = video.filter("setpts", f"PTS-{start:.6f}/TB")
    # Rounding up gives output k the last frame with a time stamp of at most k/F.
    video = video.filter("fps", fps=f"{settings.frames_per_second:.9g}", round="up", start_time=0)
    video = video.filter(
        "scale",
        w=f"max({size},round({size}*dar))",
        h=f"max({size},round({size}/dar))",
        flags="bicubic+accurate_rnd+full_chroma_int+bitexact",
    )
    video = video.filter("crop", size, size)
    output = video.output(
        "pipe:",
        format="rawvideo",
        pix_fmt="rgb24",
        frames=wanted,
        fps_mode="passthrough",
        filter_threads=1,
    ).global_args("-nostdin", "-v", "error", "-xerror", "-copyts", "-start_at_zero")
    command = output.compile(cmd=imageio_ffmpeg.get_ffmpeg_exe())
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DecodeError(f"{path} took longer than {timeout:g} s to decode") from error
    if done.returncode != 0:
        raise DecodeError(f"{path} cannot be decoded as a video: {_complaint(done)}")
    return done.stdout


def _complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """What ffmpeg said first, in words that are the same in every run."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    if not lines:
        return f"ffmpeg ended with code {done.returncode}"
    if "matches no streams" in lines[0]:
        return "it holds no video stream"
    # In front stands the part of ffmpeg that speaks, with its address in memory.
    return re.sub(r"^(\[[^]]*\] )+", "", lines[0]).rstrip(".")


def _opaque(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB, alpha laid over white."""
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255 instead of scaling it.
        grey = np.asarray(image).clip(0, 65535).astype(np.uint16)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        coloured = image.convert("RGBA")
        paper = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(paper, coloured).convert("RGB")
    return image.convert("RGB")


def _head(path: Path) -> bytes:
    """The first bytes of a file; `DecodeError` where there is none to read."""
    try:
        with path.open("rb") as stream:
            head = stream.read(32)
    except FileNotFoundError as error:
        raise DecodeError(f"{path} does not exist") from error
    except OSError as error:
        raise DecodeError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise DecodeError(f"{path} is empty")
    return head


def _kind_of_content(head: bytes) -> MediaKind | None:
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")):
        return "image"
    if head.startswith(
        (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"OggS", b"\0\0\x01\xba", b"\0\0\x01\xb3")
    ):
        return "clip"
    if head.startswith(b"RIFF"):
        return {b"WEBP": "image", b"AVI ": "clip"}.get(head[8:12])  # type: ignore[return-value]
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in (b"avif", b"avis", b"heic", b"mif1") else "clip"
    return None


def _window(start: float | None, end: float | None) -> str:
    if start is None and end is None:
        return ""
    if end is None:
        return f" from {start:g} s on"
    return f" between {start or 0.0:g} and {end:g} s"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
