"""What a VQ-GAN training does about steps that would ruin it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from megatron_nuwa.config import Settings
from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.training.levels import Levels

# Losses of pixels in [-1, 1]; jumps between losses far below it are of no harm.
_SMALL_LOSS = 1e-3
_SMALL_NORM = 1e-3
_AUTOENCODER, _DISCRIMINATOR = "autoencoder", "discriminator"


class VqganGuardSettings(Settings):
    """When a step is skipped, and what follows where that does not help.

    A step whose gradient is no number is skipped, and so is one whose reconstruction loss
    (perceptual term included) or gradient norm jumps above `spike_factor` or `norm_factor` times
    its median over the last `window` steps. After `patience` skipped steps in a row, or where that
    median of the loss has risen to `drift_factor` times what it was when the discriminator started,
    the adversarial weight is multiplied by `lower_by`; after `lowerings` times, and without a
    discriminator, the run stops. Not `enabled`, it stops at the first gradient that is no number.
    """

    enabled: bool = True
    spike_factor: float = Field(5.0, gt=1)
    norm_factor: float = Field(100.0, gt=1)
    window: int = Field(128, ge=8)
    drift_factor: float = Field(3.0, gt=1)
    patience: int = Field(5, ge=1)
    lower_by: float = Field(0.5, gt=0, lt=1)
    lowerings: int = Field(4, ge=0)


class VqganGuard:
    """Judges every step of a VQ-GAN training and keeps account of the skipped ones.

    Every process has one and gives it the same figures. `adversarial_scale` is what the
    adversarial weight is to be multiplied with; `say` shows a sentence to the user, None on all
    processes but the first.
    """

    def __init__(
        self,
        settings: VqganGuardSettings,
        say: Callable[[str], None] | None,
        section: str = "vqgan",
    ) -> None:
        self._settings, self._say, self._section = settings, say, section
        self.adversarial_scale = 1.0
        self.skipped_steps = 0
        # Skipped steps of autoencoder and discriminator.
        self._in_a_row: dict[str, int] = {}
        self._lowered = 0
        self._loss = Levels(settings.window, _SMALL_LOSS)
        self._norm = Levels(settings.window, _SMALL_NORM)
        # The usual loss when the discriminator started.
        self._reference: float | None = None

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """Why a step of this reconstruction loss and gradient norm must be skipped, if it must."""
        if not math.isfinite(norm) or not math.isfinite(loss):
            return f"the loss is {loss:.4g} and the gradient norm {norm:.4g}"
        if not self._settings.enabled:
            return None
        for name, levels, value, factor in (
            ("reconstruction loss", self._loss, loss, self._settings.spike_factor),
            ("gradient norm", self._norm, norm, self._settings.norm_factor),
        ):
            usual = levels.exceeded_by(value, factor) if levels.is_full else None
            if usual is not None:
                return f"the {name} jumped to {value:.4g} from about {usual:.4g}"
        return None

    def expect_jump(self) -> None:
        """Forget the levels, because the recipe changes what is computed at this step."""
        self._loss.forget()
        self._norm.forget()

    def discriminator_starts(self) -> None:
        """Note the loss that the discriminator finds; its own gradients come on top from now on."""
        self._reference = self._loss.usual if self._loss.is_full else None
        self._norm.forget()

    def accepted(self, step: int, loss: float, norm: float, adversarial: bool) -> None:
        """Note a step that was taken.

        Raises `UserError` where the loss has drifted away for good.
        """
        self._in_a_row[_AUTOENCODER] = 0
        self._loss.add(loss)
        self._norm.add(norm)
        if not self._settings.enabled or not adversarial or not self._loss.is_full:
            return
        if self._reference is None:
            self._reference = self._loss.usual
        bound = self._settings.drift_factor * (self._reference + _SMALL_LOSS) - _SMALL_LOSS
        if self._loss.usual > bound:
            reason = (
                f"the reconstruction loss has risen to {self._loss.usual:.4g} from "
                f"{self._reference:.4g} since the discriminator started"
            )
            self._lower(step, reason)
            # The lowered weight is judged by the steps that come.
            self._loss.forget()

    def skipped(self, step: int, reason: str, adversarial: bool) -> None:
        """Count a skipped step; raises `UserError` after `patience` of them in a row."""
        self._count_skipped(_AUTOENCODER, step, reason, adversarial)

    def discriminator_takes(self, step: int, norm: float) -> bool:
        """Whether a step of the discriminator with this gradient norm may be taken.

        Raises `UserError` after `patience` in a row that may not.
        """
        if math.isfinite(norm):
            self._in_a_row[_DISCRIMINATOR] = 0
            return True
        reason = f"the gradient norm of the discriminator is {norm}"
        self._count_skipped(_DISCRIMINATOR, step, reason, adversarial=True)
        return False

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as plain values."""
        return {
            "adversarial_scale": self.adversarial_scale,
            "skipped_steps": self.skipped_steps,
            "in_a_row": dict(self._in_a_row),
            "lowered": self._lowered,
            "loss": self._loss.state(),
            "norm": self._norm.state(),
            "reference": self._reference,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.adversarial_scale = float(state["adversarial_scale"])
        self.skipped_steps = int(state["skipped_steps"])
        self._in_a_row, self._lowered = dict(state["in_a_row"]), int(state["lowered"])
        self._loss = Levels(self._settings.window, _SMALL_LOSS, state["loss"])
        self._norm = Levels(self._settings.window, _SMALL_NORM, state["norm"])
        self._reference = state["reference"]

    def _count_skipped(self, network: str, step: int, reason: str, adversarial: bool) -> None:
        if not self._settings.enabled:
            raise self._ending(step, reason)
        self.skipped_steps += 1
        in_a_row = self._in_a_row[network] = self._in_a_row.get(network, 0) + 1
        self._tell(f"step {step} is skipped: {reason}")
        if in_a_row >= self._settings.patience:
            reason = f"{in_a_row} steps in a row were skipped and in the last one {reason}"
            if not adversarial:
                raise self._ending(step, reason)
            self._lower(step, reason)
            self._in_a_row[network] = 0

    def _lower(self, step: int, reason: str) -> None:
        if self._lowered >= self._settings.lowerings:
            times = f"although the adversarial weight was lowered {self._lowered} times"
            raise self._ending(step, f"{reason}, {times}")
        self._lowered += 1
        self.adversarial_scale *= self._settings.lower_by
        self._tell(
            f"step {step}: {reason}; the adversarial weight is lowered to "
            f"{self.adversarial_scale:.3g} times the recipe's"
        )

    def _tell(self, sentence: str) -> None:
        if self._say:
            self._say(sentence)

    def _ending(self, step: int, reason: str) -> UserError:
        kind = UserError if self._say else ReportedElsewhereError
        return kind(
            f"training stopped at step {step}, because {reason}; lower "
            f"{self._section}.optimizer.learning_rate, {self._section}.optimizer.gradient_clipping "
            f"or {self._section}.loss.adversarial_weight, or change {self._section}.guard, then "
            "run again to resume"
        )
