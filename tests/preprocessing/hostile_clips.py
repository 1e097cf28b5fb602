"""Broken and hostile clips."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
from hostile_images import flat_png
from hostile_media import BLACK, BLUE, RED, Hostile, anything, greys, halves
from PIL import Image

from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program

NOT_A_VIDEO = "cannot be decoded as a video"
# Ten frames a second; of those, 0, 0.2 and 0.4 s show the frames 0, 2 and 4.
LEVELS = [40 + 15 * k for k in range(10)]
SHOWN = greys(LEVELS[0], LEVELS[2], LEVELS[4])
# Every pixel of frame N has the grey level of LEVELS.
_GREYS = "color=s={}:r=10:d=1,format=gray,geq=lum='40+15*N'"
_LOSSLESS = ("-c:v", "ffv1", "-pix_fmt", "bgr0")


def hostile_clips(folder: Path, port: int) -> list[Hostile]:
    """Write them into the folder; those that name an address name one on this port."""
    good = folder / "whole.mp4"
    _clip(good, "64x48", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    return [
        *_damaged(folder),
        *_odd_but_good(folder, good),
        *_too_short(folder, good),
        *_playlists(folder, good, port),
        *_no_clips(folder, good),
    ]


def _ffmpeg(*arguments: object) -> None:
    command = [ffmpeg_program(), "-nostdin", "-v", "error", "-y"]
    subprocess.run([*command, *map(str, arguments)], check=True)


def _clip(path: Path, size: str, *codec: object, before: str = "") -> None:
    _ffmpeg("-f", "lavfi", "-i", _GREYS.format(size) + before, *codec, path)


def _damaged(folder: Path) -> list[Hostile]:
    source = folder / "source.mp4"
    moving = ("-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=2", "-c:v", "libx264")
    _ffmpeg(*moving, source)
    late = source.read_bytes()
    _ffmpeg(*moving, "-movflags", "+faststart", source)
    early = source.read_bytes()
    source.unlink()
    # Well inside the frames that are asked for, and well after them.
    near, far = len(early) // 6, 3 * len(early) // 4
    refused = {
        "cut-index.mp4": late[: len(late) // 2],
        "cut-frames.mp4": early[:near],
        "flipped.mp4": flipped(early, near),
        "headless.mp4": early[64:],
        "zeroed.mp4": early[:near] + bytes(len(early) - near),
    }
    # Nothing in the window is damaged.
    taken = {
        "cut-late.mp4": early[:far],
        "flipped-late.mp4": flipped(early, far),
        "tail.mp4": early + np.random.default_rng(1).bytes(5000),
    }
    for name, content in (refused | taken).items():
        (folder / name).write_bytes(content)
    return [
        *(Hostile(name, NOT_A_VIDEO) for name in refused),
        *(Hostile(name, None, anything) for name in taken),
    ]


def flipped(content: bytes, place: int) -> bytes:
    """The bytes with 300 of them inverted."""
    inverted = bytes(byte ^ 0xFF for byte in content[place : place + 300])
    return content[:place] + inverted + content[place + 300 :]


def _odd_but_good(folder: Path, good: Path) -> list[Hostile]:
    _clip(folder / "one-pixel.mkv", "1x1", *_LOSSLESS)
    _clip(folder / "odd-sides.mkv", "33x17", *_LOSSLESS)
    _clip(folder / "wide.mkv", "20000x16", *_LOSSLESS)
    _clip(folder / "deep.mkv", "64x48", "-c:v", "ffv1", "-pix_fmt", "yuv420p10le")
    _clip(folder / "alpha.mkv", "64x48", "-c:v", "ffv1", "-pix_fmt", "yuva420p")
    # Frames 0 to 4 as they were, the others crowded into the time after them.
    uneven = ",settb=1/1000,setpts='if(lt(N,5),N*100,500+(N-5)*7)'"
    _clip(folder / "uneven.mkv", "64x48", *_LOSSLESS, "-fps_mode", "vfr", before=uneven)
    interlaced = ("-c:v", "mpeg2video", "-q:v", 2, "-flags", "+ildct+ilme", "-r", 25)
    _clip(folder / "interlaced.mpg", "64x48", *interlaced, before=",fps=25,setfield=tff")
    _ffmpeg("-i", good, "-c", "copy", "-output_ts_offset", 100, folder / "late.ts")
    _ffmpeg("-i", good, "-c", "copy", "-f", "mp4", folder / "a clip.jpg")
    _ffmpeg("-i", good, "-c", "copy", "-f", "mp4", folder / "http:x%d.mp4")
    # Stored with the left half red; shown with the top, or the right half, red.
    pair = "color=red:s=32x64:r=10:d=1[a];color=blue:s=32x64:r=10:d=1[b];[a][b]hstack"
    _ffmpeg("-f", "lavfi", "-i", pair, "-c:v", "libx264", folder / "upright.mp4")
    upright = folder / "upright.mp4"
    _ffmpeg("-display_rotation", 180, "-i", upright, "-c", "copy", folder / "turned.mp4")
    _ffmpeg("-display_hflip", "-i", upright, "-c", "copy", folder / "mirrored.mp4")
    _two_sizes(folder, good)
    even = ("one-pixel.mkv", "odd-sides.mkv", "wide.mkv", "deep.mkv", "alpha.mkv", "uneven.mkv")
    others = ("late.ts", "a clip.jpg", "http:x%d.mp4")
    red_right = halves((0, 0, 254), (254, 0, 0), tolerance=40)
    return [
        *(Hostile(name, None, SHOWN) for name in (*even, *others)),
        Hostile("interlaced.mpg", None, greys(LEVELS[0], LEVELS[2], LEVELS[4], tolerance=8)),
        Hostile("turned.mp4", None, red_right),
        Hostile("mirrored.mp4", None, red_right),
        Hostile("two-sizes.ts", NOT_A_VIDEO, SHOWN),
    ]


def _two_sizes(folder: Path, good: Path) -> None:
    parts = b""
    for size in ("64x48", "80x80"):
        _ffmpeg("-i", good, "-vf", f"scale={size}", "-c:v", "libx264", folder / "part.ts")
        parts += (folder / "part.ts").read_bytes()
    (folder / "part.ts").unlink()
    (folder / "two-sizes.ts").write_bytes(parts)


def _too_short(folder: Path, good: Path) -> list[Hostile]:
    _clip(folder / "one-frame.mp4", "64x48", "-c:v", "libx264", "-frames:v", 1)
    _clip(folder / "brief.mp4", "64x48", "-c:v", "libx264", "-frames:v", 3)
    _clip(folder / "no-frame.mkv", "64x48", *_LOSSLESS, "-frames:v", 0)
    Image.new("RGB", (64, 64), "red").save(folder / "cover.png")
    tone = ("-f", "lavfi", "-i", "sine=d=1")
    _ffmpeg(*tone, folder / "sound.mp4")
    cover = ("-map", 0, "-map", 1, "-c:v", "png", "-disposition:v:0", "attached_pic")
    _ffmpeg(*tone, "-i", folder / "cover.png", *cover, folder / "sound-with-cover.mp4")
    (folder / "cover.png").unlink()
    return [
        Hostile("one-frame.mp4", "has 1 frames at 5 frames a second, and 3 are needed"),
        Hostile("brief.mp4", "has 2 frames"),
        Hostile("no-frame.mkv", f"{NOT_A_VIDEO}|has no video frame"),
        Hostile("sound.mp4", "it holds no video stream"),
        Hostile("sound-with-cover.mp4", "frames|no video"),
        Hostile(good.name, "has no video frame from 90 s on", row={"start": 90.0}),
        Hostile(good.name, "has 1 frames between 0 and 0.1 s", row={"end": 0.1}),
    ]


def _playlists(folder: Path, good: Path, port: int) -> list[Hostile]:
    _ffmpeg("-i", good, "-c", "copy", folder / "secret.ts")
    address = f"http://127.0.0.1:{port}/secret.ts"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
        '<AdaptationSet mimeType="video/mp4"><Representation id="0"><BaseURL>{}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    )
    sdp = "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video {} RTP/AVP 96\n"
    texts = {
        "hls-file.mp4": hls.format("secret.ts"),
        "hls-address.ts": hls.format(address),
        "hls-absolute.mp4": hls.format(f"file://{folder}/secret.ts"),
        "concat-file.mp4": "ffconcat version 1.0\nfile secret.ts\n",
        "concat-address.avi": f"ffconcat version 1.0\nfile '{address}'\n",
        "dash.mp4": dash.format(address),
        "session.mp4": sdp.format(port),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [Hostile(name, NOT_A_VIDEO) for name in texts]


def _no_clips(folder: Path, good: Path) -> list[Hostile]:
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("a film of a dog\n")
    (folder / "noise.mkv").write_bytes(np.random.default_rng(2).bytes(4000))
    frames = [Image.new("RGB", (40, 40), colour) for colour in (RED, BLUE, BLACK)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "picture.png")
    (folder / "picture.png").rename(folder / "picture.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "nowhere.mp4").symlink_to(folder / "gone.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "endless.mp4").symlink_to("/dev/zero")
    return [
        Hostile("empty.mp4", "is empty"),
        Hostile("text.mp4", NOT_A_VIDEO),
        Hostile("noise.mkv", NOT_A_VIDEO),
        Hostile("animated.gif", "is an image, but clips of 3 frames"),
        Hostile("picture.mp4", "is an image, but clips of 3 frames"),
        Hostile("folder.mp4", "is not a regular file"),
        Hostile("nowhere.mp4", "does not exist"),
        Hostile("pipe.mp4", "is not a regular file"),
        Hostile("endless.mp4", "is not a regular file"),
        Hostile("absent.mp4", "does not exist"),
    ]


def clip_bomb(path: Path) -> Path:
    """A clip of 40 kB whose one frame has 256 million pixels."""
    picture = path.with_suffix(".png")
    picture.write_bytes(flat_png(16_000, 16_000, bits=8))
    _ffmpeg("-i", picture, "-c", "copy", path)
    picture.unlink()
    return path


def time_gap(path: Path, seconds: int) -> Path:
    """A clip of 1 kB with two frames, black and white, the second of which comes much later."""
    grey = "color=s=64x48:r=10:d=0.2,format=gray,geq=lum='255*N'"
    times = ("-vf", f"settb=1/1000,setpts=N*{seconds}*1000", "-enc_time_base", "1:1000")
    _ffmpeg("-f", "lavfi", "-i", grey, *times, *_LOSSLESS, "-fps_mode", "vfr", path)
    return path
