"""How like its original a reconstructed picture is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.training.frames import to_bytes

# The window and the constants of the structural similarity as published (Wang et al. 2004).
_WINDOW, _DEVIATION = 11, 1.5
_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each frame (batch,); both (batch, 3, H, W) in [-1, 1].

    The reconstruction is rounded to bytes first; equal pictures count as 100 dB.
    """
    error = (_as_shown(reconstruction) - _in_unit_range(images)).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each frame (batch,); both (batch, 3, H, W) in [-1, 1].

    Gaussian windows of 11 pixels and deviation 1.5 (of fewer where a side has fewer) that lie
    wholly in the frame, a mean over windows and channels; the reconstruction is rounded to bytes
    first.
    """
    found, wanted = _as_shown(reconstruction), _in_unit_range(images)
    side = min(_WINDOW, *found.shape[2:])
    places = torch.arange(side, dtype=found.dtype, device=found.device) - (side - 1) / 2
    window = torch.exp(-places.square() / (2 * _DEVIATION**2))
    window = window / window.sum()

    def local_mean(maps: Tensor) -> Tensor:
        flat = maps.flatten(0, 1).unsqueeze(1)
        flat = F.conv2d(flat, window.view(1, 1, -1, 1))
        flat = F.conv2d(flat, window.view(1, 1, 1, -1))
        return flat.squeeze(1).unflatten(0, maps.shape[:2])

    mean, other_mean = local_mean(found), local_mean(wanted)
    variance = local_mean(found.square()) - mean.square()
    other_variance = local_mean(wanted.square()) - other_mean.square()
    covariance = local_mean(found * wanted) - mean * other_mean
    similarity = (2 * mean * other_mean + _LUMINANCE) * (2 * covariance + _CONTRAST)
    similarity /= mean.square() + other_mean.square() + _LUMINANCE
    similarity /= variance + other_variance + _CONTRAST
    return similarity.mean(dim=(1, 2, 3))


def _as_shown(images: Tensor) -> Tensor:
    """Rounded to bytes, in [0, 1], float64."""
    shown = torch.from_numpy(to_bytes(images)).movedim(-1, 1).to(images.device)
    return shown.double() / 255


def _in_unit_range(images: Tensor) -> Tensor:
    return images.double().add(1).div(2)
