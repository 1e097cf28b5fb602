"""Sketches of the demo's media: maps of twelve colour classes, drawn by computer.

A pixel's class is the named colour (`generation/palette.py`) that the surroundings of the pixel
have; so a sketch is what a person might paint with twelve brushes, and the page's brushes are the
classes themselves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from launch.demo.stages import CLIP_FRAMES, CLIP_FRAMES_PER_SECOND
from megatron_nuwa.decoders import DecodeSettings, decode
from megatron_nuwa.generation.palette import colours

CLASSES = 12
SIDE = 96
_IMAGE = DecodeSettings(image_size=SIDE)
_CLIP = DecodeSettings(
    image_size=SIDE, frames=CLIP_FRAMES, frames_per_second=CLIP_FRAMES_PER_SECOND
)
# Pixels that are averaged around each, and whose classes vote about its own, so that specks go.
_AVERAGED, _VOTING = 5, 9
# Photographs are duller than brushes, and people name a colour by its hue before its lightness.
_SATURATION, _LIGHTNESS, _GAMMA = 2.2, 0.6, 0.75
# sRGB to XYZ, D65 (IEC 61966-2-1), rows divided by the white point.
_XYZ = (
    (0.4124 / 0.9505, 0.3576 / 0.9505, 0.1805 / 0.9505),
    (0.2126, 0.7152, 0.0722),
    (0.0193 / 1.089, 0.1192 / 1.089, 0.9505 / 1.089),
)


def draw_sketch(medium: Path, sketch: Path) -> None:
    """Write the sketch of an image (.png), or of all frames of a clip (.gif), that exists."""
    frames, _ = decode(medium, _CLIP if sketch.suffix == ".gif" else _IMAGE)
    write_maps(sketch, colour_maps(frames))


def colour_maps(frames: np.ndarray) -> np.ndarray:
    """Classes uint8 (frames, H, W) of frames uint8 (frames, H, W, 3) of one image or clip."""
    pixels = _averaged(torch.tensor(frames).movedim(-1, 1).float(), _AVERAGED)
    if len(pixels) > 1:
        # Neighbours in time steady what lies between two colours.
        before, after = pixels[[0, *range(len(pixels) - 1)]], pixels[[*range(1, len(pixels)), -1]]
        pixels = (before + pixels + after) / 3
    pixels = _lit(pixels)
    named = torch.tensor([_rgb(colour) for colour in colours(CLASSES)], dtype=torch.float32)
    weights = torch.tensor([_LIGHTNESS, 1, 1]).view(3, 1, 1)
    seen = _lab(pixels) * torch.tensor([1, _SATURATION, _SATURATION]).view(3, 1, 1)
    differences = [weights * (seen - colour) for colour in _lab(named.view(-1, 3, 1, 1))]
    distances = torch.stack([each.square().sum(1) for each in differences], dim=1)
    votes = F.one_hot(distances.argmin(1), CLASSES).movedim(-1, 1).float()
    return _averaged(votes, _VOTING).argmax(1).to(torch.uint8).numpy()


def write_maps(path: Path, maps: np.ndarray) -> None:
    """Write maps (frames, H, W) as a PNG or GIF whose palette indices are the classes."""
    palette = bytes(value for colour in colours(CLASSES) for value in _rgb(colour))
    images = []
    for each in maps:
        image = Image.fromarray(each)
        image.putpalette(palette)
        images.append(image)
    if path.suffix == ".png":
        images[0].save(path)
        return
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=1000 / CLIP_FRAMES_PER_SECOND,
        optimize=False,
        palette=palette,
    )


def _lit(pixels: Tensor) -> Tensor:
    """As if there were light enough: else the night side of the earth is all black."""
    brightest = pixels.amax(1).flatten().kthvalue(int(0.99 * pixels[:, 0].numel())).values
    return 255 * (pixels / brightest.clamp_min(1)).clamp(max=1) ** _GAMMA


def _rgb(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def _averaged(planes: Tensor, width: int) -> Tensor:
    """The mean of (frames, planes, H, W) over squares of this width, cut off at the borders."""
    for size in ((width, 1), (1, width)):
        padding = (size[0] // 2, size[1] // 2)
        planes = F.avg_pool2d(planes, size, stride=1, padding=padding, count_include_pad=False)
    return planes


def _lab(rgb: Tensor) -> Tensor:
    """CIELAB of sRGB (n, 3, H, W) in 0 … 255."""
    level = rgb / 255
    linear = torch.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,njhw->nihw", torch.tensor(_XYZ), linear)
    cube = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-9) ** (1 / 3), xyz * 7.787 + 4 / 29)
    x, y, z = cube.unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)
