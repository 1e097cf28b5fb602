"""The PatchGAN discriminator, its losses, and the weight that balances it against the others."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nuwa.models.autoencoder import group_norm

AdversarialLoss = Literal["hinge", "log", "log_non_saturating"]


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches: (batch, image_channels, H, W) → logits (batch, 1, h, w).

    A patch is 16, 34 or 70 pixels wide with 1, 2 or 3 `layers`.
    """

    def __init__(self, base_channels: int = 64, layers: int = 3, image_channels: int = 3) -> None:
        super().__init__()
        width = base_channels
        first = nn.Conv2d(image_channels, width, 4, stride=2, padding=1)
        blocks: list[nn.Module] = [first, nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            out = base_channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            # GroupNorm instead of the usual BatchNorm: no statistics to agree on over processes.
            blocks += [
                nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=False),
                group_norm(out),
                nn.LeakyReLU(0.2),
            ]
            width = out
        blocks.append(nn.Conv2d(width, 1, 4, padding=1))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in [-1, 1], or of maps' probabilities; positive means real."""
        logits: Tensor = self.blocks(images)
        return logits


def discriminator_loss(real: Tensor, fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """What the discriminator minimises, from logits of real images and of reconstructions.

    `log` is the paper's `−(log D(I) + log(1 − D(Î)))`; `hinge` is the usual margin form.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """What the autoencoder minimises, from the logits of its reconstructions.

    `log` is the paper's `log(1 − D(Î))`; `log_non_saturating` is `−log D(Î)`, whose gradient does
    not vanish while the discriminator wins.
    """
    if kind == "hinge":
        return -fake.mean()
    if kind == "log":
        return -F.softplus(fake).mean()
    return F.softplus(-fake).mean()


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, maximum: float
) -> Tensor:
    """Weight of the adversarial loss: `‖∇ reconstruction‖ / ‖∇ adversarial‖` at the last layer.

    Both losses are scalars that depend on the decoder's `last_layer`; the result is a scalar
    between 0 and `maximum`, without gradient (VQ-GAN, arXiv 2012.09841, Eq. 7).
    """
    (wanted,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (pushed,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    return (wanted.norm() / (pushed.norm() + 1e-6)).clamp(0, maximum).detach()
