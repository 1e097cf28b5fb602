"""What a VQ-GAN's networks are given, and how its reconstructions are judged."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nuwa.models.perceptual import EfficientNetLite0, PerceptualLoss, vgg16_loss
from megatron_nuwa.models.segmentation import one_hot
from megatron_nuwa.training.vqgan_recipe import PerceptualSettings, VqganLoss, VqganRecipe


class PictureReconstruction(nn.Module):
    """Pictures (batch, 3, H, W) in [-1, 1]: distance of pixels, and of a network's features."""

    def __init__(self, settings: VqganLoss) -> None:
        super().__init__()
        self._settings = settings
        self._perceptual: PerceptualLoss | None = None
        if settings.perceptual_weight:
            self._perceptual = perceptual_loss(settings.perceptual)

    def network_input(self, frames: Tensor) -> Tensor:
        """The pictures themselves."""
        return frames

    def shown(self, reconstruction: Tensor) -> Tensor:
        """The pictures themselves."""
        return reconstruction

    def loss(self, reconstruction: Tensor, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels' and features' distances."""
        distance = F.mse_loss if self._settings.reconstruction == "l2" else F.l1_loss
        pixels = distance(reconstruction.float(), frames)
        terms = {"train/loss/reconstruction": pixels.detach()}
        loss = self._settings.reconstruction_weight * pixels
        if self._perceptual:
            perceptual = self._perceptual(reconstruction, frames)
            terms["train/loss/perceptual"] = perceptual.detach()
            loss = loss + self._settings.perceptual_weight * perceptual
        return loss, terms


class MapReconstruction(nn.Module):
    """Maps of classes (batch, H, W): cross-entropy of the class logits (VQ-GAN-Seg)."""

    def __init__(self, settings: VqganLoss, classes: int) -> None:
        super().__init__()
        self._weight, self._classes = settings.reconstruction_weight, classes

    def network_input(self, frames: Tensor) -> Tensor:
        """One channel a class."""
        return one_hot(frames, self._classes)

    def shown(self, reconstruction: Tensor) -> Tensor:
        """Probabilities, which are what one-hot maps are."""
        return reconstruction.float().softmax(dim=1)

    def loss(self, reconstruction: Tensor, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats a pixel."""
        entropy = F.cross_entropy(reconstruction.float(), frames.long())
        return self._weight * entropy, {"train/loss/reconstruction": entropy.detach()}


def reconstruction_of(recipe: VqganRecipe) -> PictureReconstruction | MapReconstruction:
    """The kind that a recipe's model is for; `UserError` where a loss's weights are missing."""
    if recipe.model.classes is None:
        return PictureReconstruction(recipe.loss)
    return MapReconstruction(recipe.loss, recipe.model.classes)


def perceptual_loss(settings: PerceptualSettings) -> PerceptualLoss:
    """The perceptual loss that a recipe names; `UserError` where its weights are missing."""
    if settings.network == "efficientnet_lite0":
        return PerceptualLoss(EfficientNetLite0(settings.stages))
    assert settings.weights is not None
    return vgg16_loss(settings.weights, settings.lpips_weights)
