"""Broken and hostile images."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile_media import BLACK, BLUE, GREEN, RED, WHITE, Hostile, anything, halves, plain
from PIL import Image, PngImagePlugin

NOT_AN_IMAGE = "cannot be decoded as an image"


def hostile_images(folder: Path) -> list[Hostile]:
    """Write them into the folder."""
    return [*_damaged(folder), *_odd_but_good(folder), *_bombs(folder), *_no_images(folder)]


def _damaged(folder: Path) -> list[Hostile]:
    items = []
    for suffix in ("jpg", "png", "webp", "gif", "tif", "bmp", "jp2", "avif"):
        content = _encoded(_noise(), suffix)
        (folder / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
        # A GIF and a JPEG 2000 may be meant to be read as far as they have come.
        lenient = anything if suffix in ("jp2",) else None
        items.append(Hostile(f"cut.{suffix}", NOT_AN_IMAGE, lenient))
    png, jpeg = bytearray(_encoded(_noise(), "png")), bytearray(_encoded(_noise(), "jpg"))
    png[len(png) // 2] ^= 0x10
    (folder / "flipped.png").write_bytes(png)
    (folder / "flipped-header.jpg").write_bytes(_damaged_tables(jpeg))
    jpeg[-200] ^= 0x10
    (folder / "flipped-pixels.jpg").write_bytes(jpeg)
    taller = _with_png_size(_encoded(_noise(), "png"), 64, 6400)
    (folder / "lying-taller.png").write_bytes(taller)
    (folder / "lying-larger.jpg").write_bytes(_with_jpeg_size(_encoded(_noise(), "jpg"), 65500))
    return [
        *items,
        Hostile("flipped.png", NOT_AN_IMAGE),
        Hostile("flipped-header.jpg", NOT_AN_IMAGE),
        Hostile("flipped-pixels.jpg", NOT_AN_IMAGE, anything),
        # Pillow shows rows that are not there in black.
        Hostile("lying-taller.png", NOT_AN_IMAGE, anything),
        Hostile("lying-larger.jpg", "decompression bomb"),
    ]


def _odd_but_good(folder: Path) -> list[Hostile]:
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    glass = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    glass.paste((255, 0, 0, 255), (20, 0, 40, 40))
    palette = glass.quantize(4)
    sides = Image.new("RGB", (40, 40), "red")
    sides.paste((0, 0, 255), (20, 0, 40, 40))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = np.full((16, 16), 200 * 256, np.uint16)
    broken_exif = b"Exif\0\0II*\0" + b"\xff" * 40
    saved: list[tuple[str, Image.Image, dict[str, object]]] = [
        ("one-pixel.png", Image.new("RGB", (1, 1), "red"), {}),
        ("wide.png", Image.new("RGB", (20_000, 20), "red"), {}),
        ("tall.jpg", Image.new("RGB", (20, 20_000), "red"), {"quality": 95}),
        ("one-row.png", Image.new("RGB", (20_000, 1), "red"), {}),
        ("odd-sides.webp", Image.new("RGB", (33, 17), "red"), {"lossless": True}),
        ("alpha.png", glass, {}),
        ("alpha.webp", glass, {"lossless": True}),
        ("grey-alpha.png", Image.new("LA", (40, 40), (0, 0)), {}),
        ("palette-alpha.png", palette, {}),
        ("palette.gif", red.quantize(2), {}),
        ("two-colours.png", Image.new("1", (40, 40), 1), {}),
        ("cmyk.jpg", Image.new("CMYK", (40, 40), (0, 255, 255, 0)), {"quality": 95}),
        ("cmyk.tif", Image.new("CMYK", (40, 40), (0, 255, 255, 0)), {}),
        ("deep.png", Image.fromarray(deep), {}),
        ("animated.gif", red, {"save_all": True, "append_images": [blue] * 3}),
        ("animated.webp", red, {"save_all": True, "append_images": [blue], "lossless": True}),
        ("animated.png", red, {"save_all": True, "append_images": [blue]}),
        ("pages.tif", red, {"save_all": True, "append_images": [blue]}),
        # Stored with the top red, to be shown turned clockwise by a quarter: red on the right.
        ("turned.jpg", sides.rotate(-90), {"exif": turned, "quality": 95}),
        ("broken-exif.jpg", red, {"exif": broken_exif, "quality": 95}),
        ("progressive.jpg", red, {"progressive": True, "quality": 95}),
        ("plain.jp2", red, {}),
        ("plain.avif", red, {"quality": 95}),
        ("line\nbreak.png", red, {}),
    ]
    for name, image, options in saved:
        image.save(folder / name, **options)  # type: ignore[arg-type]
    (folder / "jpeg-inside.png").write_bytes(_encoded(red, "jpg"))
    (folder / "colours-16.png").write_bytes(_rgb16(GREEN))
    special: dict[str, Callable[[np.ndarray], bool]] = {
        "alpha.png": halves(WHITE, RED),
        "alpha.webp": halves(WHITE, RED),
        "palette-alpha.png": halves(WHITE, RED),
        "grey-alpha.png": plain(WHITE),
        "two-colours.png": plain(WHITE),
        "deep.png": plain((200, 200, 200)),
        "turned.jpg": halves(BLUE, RED, tolerance=60),
    }
    good = [
        Hostile(name, None, special.get(name, plain(RED, tolerance=12))) for name, _, _ in saved
    ]
    return [
        *good,
        Hostile("jpeg-inside.png", None, plain(RED)),
        Hostile("colours-16.png", None, plain(GREEN)),
    ]


def _bombs(folder: Path) -> list[Hostile]:
    (folder / "bomb.png").write_bytes(flat_png(30_000, 30_000))
    (folder / "large.png").write_bytes(flat_png(9_000, 9_000))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("note", "x" * 20_000_000, zip=True)
    Image.new("RGB", (8, 8), "red").save(folder / "text-bomb.png", pnginfo=text)
    header = b"P6 100000 100000 255\n"
    (folder / "lying.ppm").write_bytes(header + bytes(300))
    return [
        Hostile("bomb.png", "decompression bomb"),
        Hostile("large.png", None, plain(BLACK)),
        Hostile("text-bomb.png", NOT_AN_IMAGE, plain(RED)),
        Hostile("lying.ppm", "decompression bomb"),
    ]


def _no_images(folder: Path) -> list[Hostile]:
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("a photograph of a dog\n")
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")
    (folder / "vector.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    # Pillow would hand it to Ghostscript, which runs what it says.
    program = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n%%EOF\n"
    (folder / "program.jpg").write_text(program)
    Image.new("RGB", (8, 8)).save(folder / "icon.ico")
    (folder / "icon.ico").rename(folder / "icon.png")
    Image.new("F", (8, 8), 0.5).save(folder / "float.tif")
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "noise.jpg").write_bytes(np.random.default_rng(5).bytes(4000))
    (folder / "notes.txt").write_text("neither")
    return [
        Hostile("empty.png", "is empty"),
        *(
            Hostile(name, NOT_AN_IMAGE)
            for name in ("text.png", "page.jpg", "vector.png", "program.jpg", "icon.png")
        ),
        Hostile("float.tif", "floating-point"),
        Hostile("folder.png", "is not a regular file"),
        Hostile("nowhere.png", "does not exist"),
        Hostile("loop.png", "cannot be read"),
        Hostile("pipe.png", "is not a regular file"),
        Hostile("endless.png", "is not a regular file"),
        Hostile("noise.jpg", NOT_AN_IMAGE),
        Hostile("notes.txt", "is neither an image nor a video"),
        Hostile("absent.png", "does not exist"),
        Hostile("one-pixel.png", "cannot have 'start' or 'end'", row={"start": 1.0}),
    ]


def scan_bomb(path: Path, scans: int) -> Path:
    """A progressive JPEG of a few hundred kilobytes whose last scan is repeated many times."""
    content = _encoded(Image.new("RGB", (6000, 6000), "red"), "jpg", progressive=True)
    last = content.rindex(b"\xff\xda")
    path.write_bytes(content[:last] + content[last:-2] * scans + b"\xff\xd9")
    return path


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def _encoded(image: Image.Image, suffix: str, **options: object) -> bytes:
    names = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
    stream = io.BytesIO()
    image.save(stream, names.get(suffix, suffix.upper()), **options)
    return stream.getvalue()


def _damaged_tables(jpeg: bytes) -> bytes:
    """The JPEG without its quantization tables, which every decoder must notice."""
    return bytes(jpeg).replace(b"\xff\xdb", b"\xff\xfe")


def _with_jpeg_size(jpeg: bytes, side: int) -> bytes:
    """The JPEG with another width and height in its frame header."""
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", side, side) + jpeg[place + 4 :]


def _with_png_size(png: bytes, width: int, height: int) -> bytes:
    header = struct.pack(">II", width, height) + png[24:29]
    return png[:8] + _chunk(b"IHDR", header) + png[33:]


def flat_png(width: int, height: int, bits: int = 1) -> bytes:
    """A grey PNG, all black: with one bit a pixel, 100 kB for a gigapixel."""
    packed = zlib.compress(bytes((width * bits + 7) // 8 + 1) * height)
    return _png(struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0), packed)


def _rgb16(colour: tuple[int, int, int]) -> bytes:
    row = b"\0" + struct.pack(">HHH", *(257 * value for value in colour)) * 16
    return _png(struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0), zlib.compress(row * 16))


def _png(header: bytes, packed: bytes) -> bytes:
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum
