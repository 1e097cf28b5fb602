"""The pictures of the demo's page: generated images and clips, continuations, reconstructions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence

from launch.demo.media import STILL_SUFFIX
from launch.demo.sketches import CLASSES
from launch.demo.stages import CLIP_FRAMES, CLIP_FRAMES_PER_SECOND
from launch.workflow.results import read_json, read_json_lines
from megatron_nuwa.decoders import DecodeSettings, decode, decode_sketch
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.gallery import shown_given
from megatron_nuwa.generation.media import address, animation, still
from megatron_nuwa.generation.palette import coloured
from megatron_nuwa.generation.regions import composite, rectangle
from megatron_nuwa.generation.tasks import TASKS, Request
from megatron_nuwa.models.vqgan import Vqgan, load_vqgan

RECONSTRUCTIONS = 12
# The grey of what was not given.
_MISSING = 128


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
    rows = []
    for sample, frames in _samples(output / "samples" / "v2v", ".gif"):
        truth = _truth(_given(output, sample), frames)
        rows.append(_row(output, sample, "Given", truth[:1], frames, truth))
    return rows


def completions(output: Path) -> list[dict[str, Any]]:
    """Every I2I sample: what was kept of a held-out image, what was generated, the whole image."""
    rows = []
    for sample, frames in _samples(output / "samples" / "i2i", ".png"):
        truth = _truth(_given(output, sample), frames)
        kept = composite(np.full_like(truth, _MISSING), truth, _region(sample, truth))
        rows.append(_row(output, sample, "Given", kept, frames, truth))
    return rows


def manipulations(output: Path) -> list[dict[str, Any]]:
    """Every TI2I and TV2V sample: what was given, its region outlined, and what was generated."""
    rows = []
    for task, suffix in (("ti2i", ".png"), ("tv2v", ".gif")):
        for sample, frames in _samples(output / "samples" / task, suffix):
            truth = _truth(_given(output, sample), frames)
            request = Request(TASKS[task], pixels=truth, region=_region(sample, truth))
            outlined = shown_given(request)
            assert outlined is not None
            rows.append(_row(output, sample, "Given", outlined, frames, None))
    return rows


def from_sketches(output: Path) -> list[dict[str, Any]]:
    """Every S2I and S2V sample: the sketch, what was generated, what was sketched."""
    rows = []
    for task, suffix in (("s2i", ".png"), ("s2v", ".gif")):
        for sample, frames in _samples(output / "samples" / task, suffix):
            maps, _ = decode_sketch(_given(output, sample, "sketch"), _settings(frames), CLASSES)
            truth = _truth(output / "media" / _item(output, sample)["media"], frames)
            rows.append(_row(output, sample, "Sketch", coloured(maps, CLASSES), frames, truth))
    return rows


def _row(
    output: Path,
    sample: dict[str, Any],
    label: str,
    given: np.ndarray,
    generated: np.ndarray,
    truth: np.ndarray | None,
) -> dict[str, Any]:
    """One row of pictures under its caption: the asked text, or that of the held-out item."""
    asked = TASKS[sample["task"]].reads == "text"
    rate = CLIP_FRAMES_PER_SECOND
    return {
        "caption": sample["prompt"] if asked else _item(output, sample)["captions"][0],
        "label": label,
        "given": address(given, rate, lossless=True),
        "generated": address(generated, rate),
        "truth": None if truth is None else address(truth, rate),
    }


def _item(output: Path, sample: dict[str, Any]) -> dict[str, Any]:
    """The held-out item that a sample starts from."""
    field, name = ("sketch", sample["sketch"]) if "sketch" in sample else ("media", sample["given"])
    for manifest in ("heldout-clips.jsonl", "heldout-images.jsonl"):
        for item in read_json_lines(output / "media" / manifest):
            if Path(item.get(field) or "").name == Path(name).name:
                return item
    raise UserError(f"{output / 'media'}: no held-out item has the {field} {name}")


def _truth(path: Path, frames: np.ndarray) -> np.ndarray:
    """A held-out image or clip at the size and length of what was generated."""
    return decode(path, _settings(frames))[0]


def _settings(frames: np.ndarray) -> DecodeSettings:
    return DecodeSettings(
        image_size=frames.shape[1],
        # A GIF's writer leaves frames out that equal the one before.
        frames=1 if len(frames) == 1 else CLIP_FRAMES,
        frames_per_second=CLIP_FRAMES_PER_SECOND,
    )


def _region(sample: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    """The pixels that were made new: bool (1, rows, columns)."""
    rows, columns = pixels.shape[1:3]
    return rectangle(sample["region"], columns, rows, "region")[None]


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
                yield sample, _read_frames(folder / name)


def _given(output: Path, sample: dict[str, Any], field: str = "given") -> Path:
    """The file that a sample starts from, named from the working folder or the samples'."""
    folder = output / "samples" / sample["task"]
    name = sample.get(field)
    if not isinstance(name, str):
        raise UserError(f"{folder / 'samples.json'}: a sample lacks '{field}', what it starts from")
    for place in (Path(name), folder / name):
        if place.is_file():
            return place
    raise UserError(
        f"{folder / 'samples.json'}: {name}, which a sample starts from, does not exist"
    )


def _read_frames(path: Path) -> np.ndarray:
    """All frames of an image file or a GIF as uint8 (frames, rows, columns, 3)."""
    try:
        with Image.open(path) as opened:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)]
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image") from error
    return np.stack(frames)
