"""One training step of a VQ-GAN: both networks, their losses and their optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megatron_nuwa.models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from megatron_nuwa.models.vqgan import Vqgan, VqganOutput
from megatron_nuwa.training.codebook_upkeep import CodebookKeeper
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.vqgan_average import WeightAverage
from megatron_nuwa.training.vqgan_guard import VqganGuard
from megatron_nuwa.training.vqgan_losses import reconstruction_of
from megatron_nuwa.training.vqgan_recipe import VqganOptimizer, VqganRecipe

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
        self.average: WeightAverage | None = None
        if recipe.ema_decay is not None:
            self.average = WeightAverage(self.model, recipe.ema_decay)
        follower = self.average.model.quantizer if self.average else None
        self.keeper = CodebookKeeper(self.model.quantizer, recipe.codebook, seed, follower)
        say = _say if processes.is_first else None
        self.guard = VqganGuard(recipe.guard, say, recipe.section)
        self.discriminator: PatchDiscriminator | None = None
        self.discriminator_optimizer: torch.optim.Optimizer | None = None
        loss = recipe.loss
        if loss.adversarial_weight:
            self.discriminator = _placed(
                PatchDiscriminator(
                    loss.discriminator_channels,
                    loss.discriminator_layers,
                    recipe.model.image_channels,
                ),
                processes,
            )
            self._parallel_discriminator = _in_parallel(self.discriminator, processes)
            self.discriminator_optimizer = _adam(
                self.discriminator,
                recipe.optimizer,
                recipe.optimizer.discriminator_learning_rate or recipe.optimizer.learning_rate,
            )
        self._reconstruction = reconstruction_of(recipe).to(processes.device)

    @property
    def tokenizer(self) -> Vqgan:
        """The VQ-GAN to evaluate and to keep: the average of the weights, where there is one."""
        return self.average.model if self.average else self.model

    def begin_with(self, weights: Vqgan) -> None:
        """Take over the weights of another VQ-GAN of the same settings."""
        self.model.load_state_dict(weights.state_dict())
        if self.average:
            self.average.begin()

    def start_codebook(self, step: int, frames: Iterator[Tensor]) -> None:
        """Place the codes by k-means over encoder outputs of `frames`, batch by batch."""

        @torch.no_grad()
        def vectors() -> Iterator[Tensor]:
            for batch in frames:
                given = self._reconstruction.network_input(batch.to(self.processes.device))
                with self._autocast():
                    encoded = self.model.encoder(given)
                yield self.model.quantizer.to_lookup(encoded)

        self.keeper.start(step, vectors())

    def __call__(self, step: int, frames: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Train on this process's images (batch, 3, H, W) in [-1, 1], or maps (batch, H, W).

        Returns this process's figures (scalars) and how often each code was taken on all
        processes. A step that the guard finds harmful changes no weight; raises `UserError` when
        that does not help.
        """
        frames = frames.to(self.processes.device)
        given = self._reconstruction.network_input(frames)
        self._set_learning_rates(step)
        adversarial = self._enter(step)
        with self._autocast():
            output = self._parallel_model(given, step >= self.recipe.codebook.start_step)
            judged, figures = self._reconstruction.loss(output.reconstruction, frames)
            loss = judged + self._codebook_terms(step, output, figures)
            if adversarial:
                shown = self._reconstruction.shown(output.reconstruction)
                loss = loss + self._adversarial_term(loss, shown, figures)
        figures["train/loss"] = loss.detach()
        figures["train/lr"] = torch.tensor(self.optimizer.param_groups[0]["lr"])
        norm = self._backward(self.optimizer, self.model, loss)
        figures["train/grad_norm"] = norm
        # The guard's numbers are one on all: a norm's last bit may depend on the kind of GPU.
        mean_loss, same_norm = self._mean(torch.stack([judged.detach().float(), norm])).tolist()
        taken = self._take(step, mean_loss, same_norm, adversarial)
        figures["train/skipped_steps"] = torch.tensor(float(self.guard.skipped_steps))
        if not taken:
            # What such a step computed is no measure of anything.
            kept = ("train/grad_norm", "train/lr", "train/skipped_steps")
            no_counts = torch.zeros_like(self.keeper.usage)
            return {tag: figures[tag] for tag in kept if torch.isfinite(figures[tag])}, no_counts
        if adversarial:
            figures["train/adversarial_scale"] = torch.tensor(self.guard.adversarial_scale)
            discriminated = self._train_discriminator(step, given, shown.detach())
            if discriminated is not None:
                figures["train/loss/discriminator"] = discriminated
        return figures, self._keep_codes(step, output, figures)

    def state(self) -> dict[str, Any]:
        """Everything beside the networks' weights that the next step depends on."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "usage": self.keeper.usage,
            "guard": self.guard.state(),
        }
        if self.average:
            state["average_updates"] = self.average.updates
        if self.discriminator_optimizer:
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        _load_moments(self.optimizer, state["optimizer"])
        self.keeper.usage.copy_(state["usage"])
        self.guard.restore(state["guard"])
        if self.average:
            self.average.updates = int(state.get("average_updates", 0))
        if self.discriminator_optimizer:
            _load_moments(self.discriminator_optimizer, state["discriminator_optimizer"])

    def _enter(self, step: int) -> bool:
        """Whether the discriminator takes part; the guard is told where the losses change."""
        if step == self.recipe.codebook.start_step:
            self.guard.expect_jump()
        if self.discriminator is None or step < self.recipe.loss.discriminator_start:
            return False
        if step == self.recipe.loss.discriminator_start:
            self.guard.discriminator_starts()
        return True

    def _set_learning_rates(self, step: int) -> None:
        factor = learning_rate_factor(step, self.recipe.steps, self.recipe.optimizer)
        for optimizer in (self.optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = group["initial_lr"] * factor

    def _codebook_terms(self, step: int, output: VqganOutput, figures: dict[str, Tensor]) -> Tensor:
        """Codebook and commitment terms, weighed and summed."""
        weights = self.recipe.loss
        figures["train/loss/codebook"] = output.codebook_loss.detach()
        figures["train/loss/commitment"] = output.commitment_loss.detach()
        # An encoder without a codebook yet has nothing to commit to. The term stays in the graph,
        # because data parallelism wants a gradient for every parameter at every step.
        commitment = weights.commitment_weight * (step >= self.recipe.codebook.start_step)
        return weights.codebook_weight * output.codebook_loss + commitment * output.commitment_loss

    def _adversarial_term(self, loss: Tensor, shown: Tensor, figures: dict[str, Tensor]) -> Tensor:
        assert self.discriminator is not None
        settings = self.recipe.loss
        self.discriminator.requires_grad_(False)
        adversarial = generator_loss(self.discriminator(shown), settings.adversarial)
        weight = torch.ones((), device=loss.device)
        if settings.adaptive:
            last_layer = self.model.decoder.conv_out.weight
            weight = adaptive_weight(loss, adversarial, last_layer, settings.adaptive_weight_limit)
            # One weight for all, or the processes would descend different losses.
            weight = self._mean(weight)
            figures["train/adaptive_weight"] = weight
        figures["train/loss/generator"] = adversarial.detach()
        scale = settings.adversarial_weight * self.guard.adversarial_scale
        return scale * weight * adversarial

    def _take(self, step: int, loss: float, norm: float, adversarial: bool) -> bool:
        """Change the autoencoder's weights unless the guard objects; returns whether it did not."""
        reason = self.guard.reason_to_skip(loss, norm)
        if reason is not None:
            self.guard.skipped(step, reason, adversarial)
            return False
        self.optimizer.step()
        if self.average:
            self.average.update()
        self.guard.accepted(step, loss, norm, adversarial)
        return True

    def _train_discriminator(self, step: int, real: Tensor, fake: Tensor) -> Tensor | None:
        """One step of the discriminator; returns its loss, None where it could not be taken."""
        assert self.discriminator is not None
        assert self.discriminator_optimizer is not None
        self.discriminator.requires_grad_(True)
        with self._autocast():
            logits = self._parallel_discriminator(torch.cat([real, fake]))
            of_real, of_fake = logits.float().chunk(2)
            loss = discriminator_loss(of_real, of_fake, self.recipe.loss.adversarial)
        norm = self._backward(self.discriminator_optimizer, self.discriminator, loss)
        if not self.guard.discriminator_takes(step, float(self._mean(norm))):
            return None
        self.discriminator_optimizer.step()
        return loss.detach()

    def _keep_codes(self, step: int, output: VqganOutput, figures: dict[str, Tensor]) -> Tensor:
        """Count the codes and move the dead ones; returns the counts."""
        counts = self.keeper.count(output.tokens)
        figures["codebook/dead_fraction"] = self.keeper.dead_fraction()
        if step >= self.recipe.codebook.start_step:
            moved = self.keeper.restart_dead(step, output.vectors)
            figures["codebook/restarted"] = torch.tensor(float(moved))
        return counts

    def _backward(
        self, optimizer: torch.optim.Optimizer, network: nn.Module, loss: Tensor
    ) -> Tensor:
        """Gradients, clipped; returns their norm before that, which is one on all processes."""
        optimizer.zero_grad()
        loss.backward()
        limit = self.recipe.optimizer.gradient_clipping
        norm: Tensor = nn.utils.clip_grad_norm_(network.parameters(), limit or math.inf)
        return norm.detach()

    def _mean(self, value: Tensor) -> Tensor:
        """Over all processes."""
        total = value.clone()
        dist.all_reduce(total)
        return total / self.processes.world_size

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.processes.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"
        )


def _say(line: str) -> None:
    print(line, flush=True)


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


def _load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up saved moments; learning rate and betas stay what the recipe says now."""
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)


def _placed(network: N, processes: Processes) -> N:
    # Convolutions are fastest with channels last, and give gradients in that layout anyway.
    return network.to(device=processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _in_parallel(network: nn.Module, processes: Processes) -> DistributedDataParallel:
    device_ids = [processes.local_rank] if processes.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids)
