"""Still images, by Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from megatron_nuwa.decoders.kinds import read_head
from megatron_nuwa.decoders.settings import DecodeError, DecodeSettings

# Pillow knows many more, some of which run other programs (EPS starts Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def decode_image(path: Path, settings: DecodeSettings) -> np.ndarray:
    """The image, upright, opaque and centre-cropped to the settings' shape: uint8 (1, H, W, 3).

    Alpha is laid over white; of an animation the first frame is taken. Raises `DecodeError`.
    """
    with opened_image(path) as opened:
        return fitted_image(ImageOps.exif_transpose(opened), settings)


def fitted_image(upright: Image.Image, settings: DecodeSettings) -> np.ndarray:
    """As `decode_image`, of an image that is open already."""
    size = target_size(upright.width, upright.height, settings)
    fitted = ImageOps.fit(_opaque(upright), size, Image.Resampling.BICUBIC)
    return np.asarray(fitted, dtype=np.uint8)[None]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright image, from its header; raises `DecodeError`."""
    with opened_image(path) as opened:
        turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (opened.height, opened.width) if turned else opened.size


@contextmanager
def opened_image(path: Path, formats: tuple[str, ...] = IMAGE_FORMATS) -> Iterator[Image.Image]:
    """The opened image; whatever goes wrong with it in the block becomes a `DecodeError`."""
    read_head(path)
    try:
        with warnings.catch_warnings():
            # Pillow only warns about images of suspicious size; a farm must not decode them.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as opened:
                yield opened
    except DecodeError:
        raise
    except MemoryError as error:
        raise DecodeError(f"{path} needs more memory to decode than is allowed") from error
    # Broken bytes raise whatever the format's parser stumbles on: OSError, SyntaxError,
    # ValueError, struct.error, EOFError, IndexError and more.
    except Exception as error:
        raise DecodeError(f"{path} cannot be decoded as an image: {_one_line(error)}") from error


def target_size(width: int, height: int, settings: DecodeSettings) -> tuple[int, int]:
    """Width and height that a medium of this width and height gets."""
    side = settings.image_size
    if settings.fit == "crop":
        return side, side
    multiple = settings.side_multiple
    longer = [max(side, round(side * a / b)) for a, b in ((width, height), (height, width))]
    return tuple(max(side, length // multiple * multiple) for length in longer)  # type: ignore[return-value]


def in_8_bits(image: Image.Image) -> Image.Image:
    """An image whose 16-bit grey is scaled, white to white; others as they are.

    Raises `ValueError` for floating-point pixels.
    """
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255 instead of scaling it.
        grey = np.asarray(image).clip(0, 65535).astype(np.uint16)
        return Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("it has floating-point pixels, of which nobody knows what is white")
    return image


def _opaque(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB, alpha laid over white."""
    image = in_8_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        coloured = image.convert("RGBA")
        paper = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(paper, coloured).convert("RGB")
    return image.convert("RGB")


def _one_line(error: BaseException) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "its content is of no known image format"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
