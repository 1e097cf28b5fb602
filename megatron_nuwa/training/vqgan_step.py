"""One training step of a VQ-GAN: both networks, their losses and their optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from megatron_nuwa.models.perceptual import EfficientNetLite0, PerceptualLoss, vgg16_loss
from megatron_nuwa.models.vqgan import Vqgan, VqganOutput
from megatron_nuwa.training.codebook_upkeep import CodebookKeeper
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.vqgan_recipe import PerceptualSettings, VqganOptimizer, VqganRecipe

N = TypeVar("N", bound=nn.Module)


class VqganStep:
    """The state of a VQ-GAN training, equal on all processes after every step."""

    def __init__(self, recipe: VqganRecipe, seed: int, processes: Processes) -> None:
        self.recipe = recipe
        self.processes = processes
        torch.manual_seed(seed)
        self.model = _placed(Vqgan(recipe.model), processes)
        self._parallel_model = _in_parallel(self.model, processes)
        self.optimizer = _adam(self.model, recipe.optimizer, recipe.optimizer.learning_rate)
        self.keeper = CodebookKeeper(self.model.quantizer, recipe.codebook, seed)
        self.discriminator: PatchDiscriminator | None = None
        self.discriminator_optimizer: torch.optim.Optimizer | None = None
        loss = recipe.loss
        if loss.adversarial_weight:
            self.discriminator = _placed(
                PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers),
                processes,
            )
            self._parallel_discriminator = _in_parallel(self.discriminator, processes)
            self.discriminator_optimizer = _adam(
                self.discriminator,
                recipe.optimizer,
                recipe.optimizer.discriminator_learning_rate or recipe.optimizer.learning_rate,
            )
        self._perceptual: PerceptualLoss | None = None
        if loss.perceptual_weight:
            self._perceptual = perceptual_loss(loss.perceptual).to(processes.device)

    def start_codebook(self, step: int, images: Iterator[Tensor]) -> None:
        """Place the codes by k-means over encoder outputs of `images`, batch by batch."""

        @torch.no_grad()
        def vectors() -> Iterator[Tensor]:
            for batch in images:
                with self._autocast():
                    encoded = self.model.encoder(batch.to(self.processes.device))
                yield self.model.quantizer.to_lookup(encoded)

        self.keeper.start(step, vectors())

    def __call__(self, step: int, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Train on this process's images (batch, 3, H, W) in [-1, 1].

        Returns this process's figures (scalars) and how often each code was taken on all
        processes. Raises `UserError` when the gradient is no longer finite.
        """
        images = images.to(self.processes.device)
        factor = learning_rate_factor(step, self.recipe.steps, self.recipe.optimizer)
        for optimizer in (self.optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = group["initial_lr"] * factor
        adversarial = self.discriminator and step >= self.recipe.loss.discriminator_start
        with self._autocast():
            output = self._parallel_model(images, step >= self.recipe.codebook.start_step)
            loss, figures = self._reconstruction_terms(step, output, images)
            if adversarial:
                loss = loss + self._adversarial_term(loss, output.reconstruction, figures)
        figures["train/loss/total"] = loss.detach()
        figures["train/grad_norm"] = self._descend(step, self.optimizer, self.model, loss)
        figures["train/lr"] = torch.tensor(self.optimizer.param_groups[0]["lr"])
        if adversarial:
            figures["train/loss/discriminator"] = self._train_discriminator(
                step, images, output.reconstruction.detach()
            )
        counts = self.keeper.count(output.tokens)
        if step >= self.recipe.codebook.start_step:
            moved = self.keeper.restart_dead(step, output.vectors)
            figures["codebook/restarted"] = torch.tensor(float(moved))
        return figures, counts

    def state(self) -> dict[str, Any]:
        """Everything beside the networks' weights that the next step depends on."""
        state = {"optimizer": self.optimizer.state_dict(), "usage": self.keeper.usage}
        if self.discriminator_optimizer:
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.keeper.usage.copy_(state["usage"])
        if self.discriminator_optimizer:
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def _reconstruction_terms(
        self, step: int, output: VqganOutput, images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction, perceptual, codebook and commitment terms, weighed and summed."""
        weights = self.recipe.loss
        distance = F.mse_loss if weights.reconstruction == "l2" else F.l1_loss
        reconstruction = distance(output.reconstruction.float(), images)
        figures = {"train/loss/reconstruction": reconstruction.detach()}
        loss = weights.reconstruction_weight * reconstruction
        if self._perceptual:
            perceptual = self._perceptual(output.reconstruction, images)
            figures["train/loss/perceptual"] = perceptual.detach()
            loss = loss + weights.perceptual_weight * perceptual
        figures["train/loss/codebook"] = output.codebook_loss.detach()
        figures["train/loss/commitment"] = output.commitment_loss.detach()
        # An encoder without a codebook yet has nothing to commit to. The term stays in the graph,
        # because data parallelism wants a gradient for every parameter at every step.
        commitment = weights.commitment_weight * (step >= self.recipe.codebook.start_step)
        loss = loss + weights.codebook_weight * output.codebook_loss
        return loss + commitment * output.commitment_loss, figures

    def _adversarial_term(
        self, loss: Tensor, reconstruction: Tensor, figures: dict[str, Tensor]
    ) -> Tensor:
        assert self.discriminator is not None
        settings = self.recipe.loss
        self.discriminator.requires_grad_(False)
        adversarial = generator_loss(self.discriminator(reconstruction), settings.adversarial)
        weight = torch.ones((), device=loss.device)
        if settings.adaptive:
            last_layer = self.model.decoder.conv_out.weight
            weight = adaptive_weight(loss, adversarial, last_layer, settings.adaptive_weight_limit)
            # One weight for all, or the processes would descend different losses.
            dist.all_reduce(weight)
            weight /= self.processes.world_size
            figures["train/adaptive_weight"] = weight
        figures["train/loss/generator"] = adversarial.detach()
        return settings.adversarial_weight * weight * adversarial

    def _train_discriminator(self, step: int, images: Tensor, reconstruction: Tensor) -> Tensor:
        assert self.discriminator is not None
        assert self.discriminator_optimizer is not None
        self.discriminator.requires_grad_(True)
        with self._autocast():
            logits = self._parallel_discriminator(torch.cat([images, reconstruction]))
            real, fake = logits.float().chunk(2)
            loss = discriminator_loss(real, fake, self.recipe.loss.adversarial)
        self._descend(step, self.discriminator_optimizer, self.discriminator, loss)
        return loss.detach()

    def _descend(
        self, step: int, optimizer: torch.optim.Optimizer, network: nn.Module, loss: Tensor
    ) -> Tensor:
        optimizer.zero_grad()
        loss.backward()
        limit = self.recipe.optimizer.gradient_clipping
        norm = nn.utils.clip_grad_norm_(network.parameters(), limit or math.inf)
        # The gradient is the mean over processes, so all of them stop together.
        if not torch.isfinite(norm):
            raise UserError(
                f"the gradient is not finite at step {step}; lower vqgan.optimizer.learning_rate "
                f"or vqgan.optimizer.gradient_clipping, then run again to resume"
            )
        optimizer.step()
        return norm.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.processes.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"
        )


def perceptual_loss(settings: PerceptualSettings) -> PerceptualLoss:
    """The perceptual loss that a recipe names; `UserError` where its weights are missing."""
    if settings.network == "efficientnet_lite0":
        return PerceptualLoss(EfficientNetLite0(settings.stages))
    assert settings.weights is not None
    return vgg16_loss(settings.weights, settings.lpips_weights)


def learning_rate_factor(step: int, steps: int, settings: VqganOptimizer) -> float:
    """Factor of the learning rate at a step: linear warm-up, then constant or down a cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.decay == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _adam(network: nn.Module, settings: VqganOptimizer, learning_rate: float) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(
        network.parameters(), lr=learning_rate, betas=settings.betas, fused=True
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = learning_rate
    return optimizer


def _placed(network: N, processes: Processes) -> N:
    # Convolutions are fastest with channels last, and give gradients in that layout anyway.
    return network.to(device=processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _in_parallel(network: nn.Module, processes: Processes) -> DistributedDataParallel:
    device_ids = [processes.local_rank] if processes.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids)
