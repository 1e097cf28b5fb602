"""Segmentation maps made from pictures: regions of like colour, each named by a colour class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageColor

from megatron_nuwa.decoders import (
    DecodeError,
    DecodeSettings,
    decode_clip,
    decode_image,
    media_kind,
)
from megatron_nuwa.files import write_text_atomically
from preprocessing.sources import SourceItem, read_manifest

COLOURS = (
    *("black", "dimgray", "silver", "white", "maroon", "red", "orange", "gold"),
    *("olive", "green", "turquoise", "skyblue", "blue", "purple", "pink", "sienna"),
)
_SIDE = 96
_REGIONS = 6
_ITERATIONS = 10
# Pixels around each that vote about its region, so that regions have no specks.
_VOTERS = 7


def write_sketches(manifest: Path, folder: Path, frames: int, frames_per_second: float) -> Path:
    """Make a map of every frame of a manifest's good items; returns a manifest that names them.

    A picture's colours (a clip's, over all of its frames) are grouped by k-means, each group gets
    the class of the nearest of `COLOURS`, and each pixel what most pixels around it have. Maps that
    a call before has finished stay.
    """
    path = folder / manifest.name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for item in read_manifest(manifest):
        name = f"{item.id}.npy"
        try:
            pictures = _frames(item, frames, frames_per_second)
        except DecodeError:
            # One clip of the demo is broken on purpose.
            continue
        np.save(folder / name, colour_map(pictures))
        rows.append({"id": item.id, "media": str(item.media), "sketch": name, "captions": []})
    write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def colour_map(frames: np.ndarray) -> np.ndarray:
    """Classes uint8 (frames, H, W) of frames uint8 (frames, H, W, 3); the same for the same."""
    pixels = torch.from_numpy(frames.copy()).float()
    # Dark pictures would be black all over.
    darkest, brightest = np.percentile(frames, (1, 99))
    pixels = ((pixels - darkest) / max(brightest - darkest, 1.0)).clamp(0, 1)
    smooth = F.avg_pool2d(pixels.movedim(-1, 1), 5, stride=1, padding=2, count_include_pad=False)
    flat = smooth.movedim(1, -1).reshape(-1, 3)
    centres = _group(flat)
    named = torch.tensor([ImageColor.getrgb(name) for name in COLOURS]).float().div(255)
    classes = torch.cdist(centres, named).argmin(1)
    maps = classes[torch.cdist(flat, centres).argmin(1)].view(frames.shape[:3])
    return torch.stack([_voted(each) for each in maps]).numpy().astype(np.uint8)


def _frames(item: SourceItem, frames: int, frames_per_second: float) -> np.ndarray:
    assert isinstance(item.media, Path)
    if media_kind(item.media) == "image":
        return decode_image(item.media, DecodeSettings(image_size=_SIDE))
    settings = DecodeSettings(
        image_size=_SIDE, frames=frames, frames_per_second=frames_per_second, short_clips="pad"
    )
    decoded, real = decode_clip(item.media, settings, item.start, item.end)
    return decoded[:real]


def _group(pixels: torch.Tensor) -> torch.Tensor:
    """Centres of k-means, begun at pixels spread evenly over the brightness."""
    order = pixels.sum(1).argsort()
    places = torch.linspace(0, len(order) - 1, 2 * _REGIONS + 1)[1::2].long()
    centres = pixels[order[places]]
    for _ in range(_ITERATIONS):
        owners = torch.cdist(pixels, centres).argmin(1)
        sizes = torch.bincount(owners, minlength=_REGIONS).clamp_min(1).unsqueeze(1)
        centres = torch.zeros_like(centres).index_add_(0, owners, pixels) / sizes
    return centres


def _voted(classes: torch.Tensor) -> torch.Tensor:
    votes = F.one_hot(classes, len(COLOURS)).movedim(-1, 0).float()
    return F.avg_pool2d(votes, _VOTERS, stride=1, padding=_VOTERS // 2).argmax(0)
