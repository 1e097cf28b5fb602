"""How well a VQ-GAN reconstructs held-out frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from megatron_nuwa.models.segmentation import (
    class_map,
    confusion_matrix,
    frequency_weighted_iou,
    one_hot,
    palette,
    pixel_accuracy,
)
from megatron_nuwa.models.vqgan import Vqgan
from megatron_nuwa.training.codebook_upkeep import perplexity
from megatron_nuwa.training.frames import Draw, Sample, load, to_bytes, to_images
from megatron_nuwa.training.image_quality import psnr, ssim


class VqganEvaluation(NamedTuple):
    """Figures over all held-out frames.

    `quality` holds `psnr_db` and `ssim`, means over pictures in [0, 1], or `pixel_accuracy` and
    `fwiou` (frequency-weighted intersection over union) of maps.
    """

    quality: dict[str, float]
    used_fraction: float  # share of the codes that occur at least once
    perplexity: float
    frames: int
    broken: int = 0  # items that could not be decoded; the ones after them were taken for them

    def figures(self) -> dict[str, float]:
        """All of the VQ-GAN, by name."""
        names = ("used_fraction", "perplexity", "frames")
        return {**self.quality, **{name: getattr(self, name) for name in names}}


@torch.no_grad()
def evaluate_vqgan(
    model: Vqgan,
    dataset: Dataset[Sample],
    batch_size: int,
    device: torch.device,
    workers: int,
    on_progress: Callable[[], None] = lambda: None,
) -> VqganEvaluation:
    """Reconstruct every frame of `dataset` once, shared out over the processes.

    Frames are taken as they will be shown: through tokens, pictures rounded to bytes. `workers`
    processes load them, so that a GPU does not wait for each to be decoded; `on_progress` is called
    before each batch.
    """
    total = len(dataset)  # type: ignore[arg-type]
    places = range(dist.get_rank(), total, dist.get_world_size())
    classes = model.config.classes
    # Of pictures: sums of PSNR and SSIM; of maps: their confusion matrix.
    shape = (2,) if classes is None else (classes, classes)
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    counts = torch.zeros(model.config.codebook_size, device=device)
    broken = torch.zeros((), dtype=torch.int64, device=device)
    starts = range(0, len(places), batch_size)
    draws = [[Draw(place, 0) for place in places[at : at + batch_size]] for at in starts]
    on_progress()
    for batch in load(dataset, draws, min(workers, len(draws))):
        on_progress()
        broken += batch.broken
        frames = _centres(model, batch.frames, device)
        tokens = model.encode(network_input(model, frames))
        counts += torch.bincount(tokens.flatten(), minlength=counts.shape[0])
        decoded = model.decode(tokens)
        if classes is None:
            sums += torch.stack([psnr(decoded, frames).sum(), ssim(decoded, frames).sum()])
        else:
            sums += confusion_matrix(class_map(decoded), frames, classes)
    dist.all_reduce(sums)
    dist.all_reduce(counts)
    dist.all_reduce(broken)
    if classes is None:
        quality = {"psnr_db": float(sums[0] / total), "ssim": float(sums[1] / total)}
    else:
        quality = {"pixel_accuracy": pixel_accuracy(sums), "fwiou": frequency_weighted_iou(sums)}
    used = float((counts > 0).double().mean())
    return VqganEvaluation(quality, used, perplexity(counts), total, int(broken))


def held_out_frames(
    model: Vqgan, dataset: Dataset[Sample], places: range, device: torch.device
) -> Tensor:
    """Images (count, 3, H, W) in [-1, 1] or maps (count, H, W), the centre at the image size."""
    frames = np.stack([dataset[Draw(place, 0)].frame for place in places])
    return _centres(model, torch.from_numpy(frames), device)


def _centres(model: Vqgan, frames: Tensor, device: torch.device) -> Tensor:
    size = model.config.image_size
    corner = (frames.shape[1] - size) // 2
    centre = frames[:, corner : corner + size, corner : corner + size]
    return to_images(centre.to(device))


def network_input(model: Vqgan, frames: Tensor) -> Tensor:
    """What the encoder takes of images or maps."""
    classes = model.config.classes
    return frames if classes is None else one_hot(frames, classes)


@torch.no_grad()
def comparison(model: Vqgan, frames: Tensor) -> np.ndarray:
    """Each frame above its reconstruction, maps in colours: uint8 (batch, 2·H, W, 3)."""
    decoded = model.decode(model.encode(network_input(model, frames)))
    classes = model.config.classes
    if classes is None:
        return to_bytes(torch.cat([frames, decoded], dim=2))
    return palette(classes)[torch.cat([frames.long(), class_map(decoded)], dim=1).cpu().numpy()]
