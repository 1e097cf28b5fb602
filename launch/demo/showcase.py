"""The pictures of the demo's page: generated images and clips, continuations, reconstructions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.demo.media import STILL_SUFFIX
from launch.demo.pictures import read_frames
from launch.demo.results import read_json, read_json_lines
from launch.demo.stages import CLIP_FRAMES, CLIP_FRAMES_PER_SECOND
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.media import animation, still
from megatron_nuwa.models.vqgan import Vqgan, load_vqgan
from preprocessing.decoders import DecodeSettings, decode

RECONSTRUCTIONS = 12


def generated_images(output: Path) -> list[dict[str, Any]]:
    """Every image of the T2I samples with its prompt."""
    return [
        {"prompt": sample["prompt"], "seed": sample.get("seed"), "source": still(frames[0])}
        for sample, frames in _samples(output / "samples" / "t2i", ".png")
    ]


def generated_clips(output: Path) -> list[dict[str, Any]]:
    """Every clip of the T2V samples with its prompt."""
    return [
        {
            "prompt": sample["prompt"],
            "seed": sample.get("seed"),
            "source": animation(frames, CLIP_FRAMES_PER_SECOND),
        }
        for sample, frames in _samples(output / "samples" / "t2v", ".gif")
    ]


def continuations(output: Path) -> list[dict[str, Any]]:
    """Every V2V sample: the given frame, what was generated, what really followed."""
    folder = output / "samples" / "v2v"
    captions = {
        Path(row["media"]).name: row["captions"][0]
        for row in read_json_lines(output / "media" / "heldout-clips.jsonl")
    }
    rows = []
    for sample, frames in _samples(folder, ".gif"):
        given = _find(sample.get("given"), folder)
        settings = DecodeSettings(
            image_size=frames.shape[1],
            frames=CLIP_FRAMES,
            frames_per_second=CLIP_FRAMES_PER_SECOND,
        )
        truth, _ = decode(given, settings)
        rows.append(
            {
                "caption": captions.get(given.name, given.stem),
                "given": still(truth[0]),
                "generated": animation(frames, CLIP_FRAMES_PER_SECOND),
                "truth": animation(truth, CLIP_FRAMES_PER_SECOND),
            }
        )
    return rows


@torch.no_grad()
def reconstructions(output: Path, count: int = RECONSTRUCTIONS) -> list[dict[str, Any]]:
    """Held-out frames beside what the VQ-GAN makes of them, with the PSNR of each."""
    model = load_vqgan(output / "vqgan")
    rows = []
    for item, frame in _heldout_frames(output / "media", model, count):
        pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        restored = model.decode(model.encode(pixels))
        levels = ((restored[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
        shown = levels.to(torch.uint8).numpy()
        rows.append(
            {
                "caption": item["captions"][0],
                "original": still(frame),
                "restored": still(shown),
                "psnr": peak_signal_to_noise(frame, shown),
            }
        )
    return rows


def peak_signal_to_noise(original: np.ndarray, copy: np.ndarray) -> float:
    """PSNR in dB of two uint8 pictures; equal ones count as 100 dB."""
    error = np.square(original.astype(np.float64) - copy.astype(np.float64)).mean()
    return float(10 * np.log10(255.0**2 / error)) if error else 100.0


def _heldout_frames(
    media: Path, model: Vqgan, count: int
) -> Iterable[tuple[dict[str, Any], np.ndarray]]:
    """First frames of held-out clips, and held-out photographs; as many views as possible."""
    size = model.config.image_size
    clip = DecodeSettings(
        image_size=size, frames=CLIP_FRAMES, frames_per_second=CLIP_FRAMES_PER_SECOND
    )
    image = DecodeSettings(image_size=size)
    clips = _one_a_view(read_json_lines(media / "heldout-clips.jsonl"))
    images = [
        item
        for item in read_json_lines(media / "heldout-images.jsonl")
        if not item["id"].endswith(STILL_SUFFIX)
    ]
    chosen = [(item, clip) for item in _spread(clips, count - count // 3)]
    chosen += [(item, image) for item in _spread(images, count // 3)]
    for item, settings in chosen:
        frames, _ = decode(media / item["media"], settings)
        yield item, frames[0]


def _one_a_view(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first clip of each view of each video; ids end in the time at which a clip begins."""
    views: dict[str, dict[str, Any]] = {}
    for item in items:
        views.setdefault(item["id"].rpartition("-")[0], item)
    return list(views.values())


def _spread(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` items at equal distances."""
    if len(items) <= count:
        return items
    return [items[len(items) * place // count] for place in range(count)]


def _samples(folder: Path, suffix: str) -> Iterable[tuple[dict[str, Any], np.ndarray]]:
    """The samples of one task with the frames of their file of that kind."""
    for sample in read_json(folder / "samples.json"):
        for name in sample["files"]:
            if name.endswith(suffix):
                yield sample, read_frames(folder / name)


def _find(name: object, folder: Path) -> Path:
    """The clip that a continuation was given, named from the working folder or the samples'."""
    if not isinstance(name, str):
        raise UserError(f"{folder / 'samples.json'}: a sample lacks 'given', the clip it continues")
    for place in (Path(name), folder / name):
        if place.is_file():
            return place
    raise UserError(f"{folder / 'samples.json'}: the given clip {name} does not exist")
