"""Sketches: the classes on disk are the classes in memory, whatever file they come in."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nuwa.decoders import DecodeError, DecodeSettings, decode_image, decode_sketch

SIDE = DecodeSettings(image_size=12)
CLIP = DecodeSettings(image_size=12, frames=4, frames_per_second=5, short_clips="pad")
# Colours in an order of their own, so that an index is not a grey level.
PALETTE = [value for number in range(256) for value in ((number * 37) % 256, 255 - number, 90)]


def numbers(frames: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 9, (frames, 12, 12)).astype(np.uint8)


def palette_image(numbers_: np.ndarray) -> Image.Image:
    image = Image.fromarray(numbers_)
    image.putpalette(PALETTE)
    return image


def write_gif(path: Path, maps: np.ndarray, **options: object) -> None:
    first, *others = [palette_image(each) for each in maps]
    settings = {"save_all": True, "append_images": others, "optimize": False, "duration": 200}
    first.save(path, palette=bytes(PALETTE), **(settings | options))


def grey_png(maps: np.ndarray, bits: int) -> bytes:
    """A PNG of 2 or 4 bits a pixel, as tools that save space write it."""
    rows = [np.packbits(np.unpackbits(r[:, None], axis=1)[:, 8 - bits :].flatten()) for r in maps]
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", maps.shape[1], maps.shape[0], bits, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("name", ["grey.png", "palette.png", "4-bits.png", "map.gif", "map.npy"])
def test_every_format_gives_the_numbers_that_were_written(name: str, tmp_path: Path) -> None:
    path, [maps] = tmp_path / name, numbers()
    if name == "grey.png":
        Image.fromarray(maps).save(path)
    elif name == "4-bits.png":
        path.write_bytes(grey_png(maps, 4))
    elif name == "map.npy":
        np.save(path, maps)
    elif name == "map.gif":
        write_gif(path, maps[None])
    else:
        palette_image(maps).save(path)
    found, real = decode_sketch(path, SIDE, 9)
    assert real == 1
    assert found.dtype == np.uint8
    assert np.array_equal(found, maps[None])


def test_two_grey_levels_and_16_bits_are_class_numbers_too(tmp_path: Path) -> None:
    maps = numbers()[0] % 2
    Image.fromarray(maps.astype(bool)).save(tmp_path / "mask.png")
    Image.fromarray(maps.astype(np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "2-bits.png").write_bytes(grey_png(maps, 2))
    for name in ("mask.png", "deep.png", "2-bits.png"):
        assert np.array_equal(decode_sketch(tmp_path / name, SIDE, 2)[0][0], maps)


@pytest.mark.parametrize("size", [(48, 36), (36, 60), (24, 24), (12, 30)])
def test_a_map_is_cropped_like_its_picture(size: tuple[int, int], tmp_path: Path) -> None:
    """Fields of one colour keep their class: picture and map show the same at every pixel."""
    width, height = size
    rows, columns = np.mgrid[:height, :width] // 12
    maps = ((rows * 5 + columns) % 4).astype(np.uint8)
    Image.fromarray(maps * 80).convert("RGB").save(tmp_path / "picture.png")
    Image.fromarray(maps).save(tmp_path / "map.png")
    settings = DecodeSettings(image_size=24)
    shown = decode_image(tmp_path / "picture.png", settings)[0, :, :, 0].astype(float) / 80
    found = decode_sketch(tmp_path / "map.png", settings, 4)[0][0]
    # Where two fields meet, the picture is a mixture.
    certain = np.abs(shown - np.round(shown)) < 0.02
    assert certain.mean() > 0.4
    assert np.array_equal(found[certain], np.round(shown[certain]))


@pytest.mark.parametrize("name", ["clip.npy", "clip.gif"])
def test_clips_give_a_map_a_frame_and_repeat_the_last_one(name: str, tmp_path: Path) -> None:
    maps = numbers(3)
    if name == "clip.npy":
        np.save(tmp_path / name, maps)
    else:
        write_gif(tmp_path / name, maps)
    found, real = decode_sketch(tmp_path / name, CLIP, 9)
    assert real == 3
    assert np.array_equal(found, maps[[0, 1, 2, 2]])
    fewer, real = decode_sketch(tmp_path / name, CLIP.model_copy(update={"frames": 2}), 9)
    assert real == 2
    assert np.array_equal(fewer, maps[:2])
    with pytest.raises(DecodeError, match=r"has 3 maps, and 4 are needed"):
        decode_sketch(tmp_path / name, CLIP.model_copy(update={"short_clips": "skip"}), 9)
    with pytest.raises(DecodeError, match="has more than one map, but belongs to an image"):
        decode_sketch(tmp_path / name, SIDE, 9)


def test_gif_frames_that_a_writer_joined_still_count_for_their_duration(tmp_path: Path) -> None:
    maps = numbers(2)[[0, 0, 0, 1]]
    write_gif(tmp_path / "clip.gif", maps)
    assert Image.open(tmp_path / "clip.gif").n_frames == 2
    assert np.array_equal(decode_sketch(tmp_path / "clip.gif", CLIP, 9)[0], maps)
    # As the sketch of a picture, one frame is one map however long it is shown.
    write_gif(tmp_path / "still.gif", maps[:1], duration=5000)
    assert np.array_equal(decode_sketch(tmp_path / "still.gif", SIDE, 9)[0], maps[:1])


def test_unlabelled_pixels_become_the_last_class_where_they_are_named(tmp_path: Path) -> None:
    maps = numbers()[0]
    maps[3, 5] = 255
    Image.fromarray(maps).save(tmp_path / "map.png")
    with pytest.raises(DecodeError) as caught:
        decode_sketch(tmp_path / "map.png", SIDE, 10)
    assert str(caught.value) == (
        f"{tmp_path / 'map.png'} has class 255 (usually the mark of unlabelled pixels) at row 3, "
        "column 5 of map 0, but the classes are 0 … 9; if it is such a mark, name it "
        "(--sketch-unlabelled 255, or data.unlabelled where a VQ-GAN is trained)"
    )
    found, _ = decode_sketch(tmp_path / "map.png", SIDE, 10, unlabelled=255)
    maps[3, 5] = 9
    assert np.array_equal(found[0], maps)


def _colours(path: Path) -> None:
    Image.new("RGB", (12, 12), "red").save(path, "PNG")


def _jpeg(path: Path) -> None:
    Image.new("L", (12, 12)).save(path, "JPEG")


def _two_palettes(path: Path) -> None:
    second = palette_image(numbers(2)[1])
    second.putpalette(PALETTE[3:] + PALETTE[:3])
    palette_image(numbers()[0]).save(
        path, "GIF", save_all=True, append_images=[second], optimize=False
    )


def _cut(path: Path) -> None:
    Image.fromarray(numbers()[0]).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:60])


def _cut_npy(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, numbers())
    path.write_bytes(path.read_bytes()[:150])


def _floats(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros((12, 12)))


def _objects(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.array([[{}]]), allow_pickle=True)


def _negative(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.full((12, 12), -1))


def _absent(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (_colours, "is no map of classes, but a picture in colours"),
        (_jpeg, "cannot be decoded as an image"),
        (_two_palettes, "an index into one palette for all frames"),
        (_cut, "cannot be decoded as an image"),
        (_cut_npy, r"is not a readable \.npy file"),
        (_floats, r"must hold integers \(rows, columns\)"),
        (_objects, r"is not a readable \.npy file"),
        (_negative, "has class -1 at row 0, column 0"),
        (_absent, "does not exist"),
    ],
)
def test_what_is_no_sketch_is_refused_by_name(write, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "sketch"
    write(path)
    with pytest.raises(DecodeError, match=sentence) as caught:
        decode_sketch(path, CLIP, 9)
    assert str(path) in str(caught.value)
