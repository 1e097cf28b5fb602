"""How well a VQ-GAN reconstructs held-out frames."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from megatron_nuwa.models.vqgan import Vqgan
from megatron_nuwa.training.codebook_upkeep import perplexity
from megatron_nuwa.training.frames import Draw, Sample, to_bytes, to_images


class VqganEvaluation(NamedTuple):
    """Figures over all held-out frames."""

    psnr_db: float  # mean over frames, of pictures in [0, 1]
    used_fraction: float  # share of the codes that occur at least once
    perplexity: float
    frames: int


@torch.no_grad()
def evaluate_vqgan(
    model: Vqgan, dataset: Dataset[Sample], batch_size: int, device: torch.device
) -> VqganEvaluation:
    """Reconstruct every frame of `dataset` once, shared out over the processes.

    Frames are taken as they will be shown: through tokens, rounded to bytes.
    """
    total = len(dataset)  # type: ignore[arg-type]
    places = range(dist.get_rank(), total, dist.get_world_size())
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    counts = torch.zeros(model.config.codebook_size, device=device)
    model.eval()
    for start in range(0, len(places), batch_size):
        chosen = places[start : start + batch_size]
        frames = held_out_images(model, dataset, chosen, device)
        tokens = model.encode(frames)
        sums[0] += psnr(model.decode(tokens), frames).sum()
        sums[1] += len(frames)
        counts += torch.bincount(tokens.flatten(), minlength=counts.shape[0])
    model.train()
    dist.all_reduce(sums)
    dist.all_reduce(counts)
    return VqganEvaluation(
        psnr_db=float(sums[0] / sums[1]),
        used_fraction=float((counts > 0).double().mean()),
        perplexity=perplexity(counts),
        frames=int(sums[1]),
    )


def held_out_images(
    model: Vqgan, dataset: Dataset[Sample], places: range, device: torch.device
) -> Tensor:
    """Frames as images (count, 3, H, W) in [-1, 1], the centre at the model's image size."""
    frames = torch.from_numpy(np.stack([dataset[Draw(place, 0)].frame for place in places]))
    size = model.config.image_size
    corner = (frames.shape[1] - size) // 2
    centre = frames[:, corner : corner + size, corner : corner + size]
    return to_images(centre).to(device)


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each frame (batch,); both (batch, 3, H, W) in [-1, 1].

    The reconstruction is rounded to bytes first; equal pictures count as 100 dB.
    """
    shown = torch.from_numpy(to_bytes(reconstruction)).movedim(-1, 1).to(images.device)
    original = images.double().add(1).div(2)
    error = (shown.double() / 255 - original).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-10))


@torch.no_grad()
def comparison(model: Vqgan, images: Tensor) -> np.ndarray:
    """Each image above its reconstruction: uint8 (batch, 2·H, W, 3)."""
    model.eval()
    shown = torch.cat([images, model.decode(model.encode(images))], dim=2)
    model.train()
    return to_bytes(shown)
