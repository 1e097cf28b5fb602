"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from megatron_nuwa.config import Settings


class ScheduleSettings(Settings):
    """Linear warm-up, then the named decay to `final_fraction` of the peak."""

    steps: int = Field(50_000_000, ge=1)
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final_fraction: float = Field(0.0, ge=0, le=1)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear growth, at least the given share of all steps."""
        return math.ceil(self.steps * self.warmup_fraction)

    def in_words(self, step: int) -> str:
        """The steps, and where warm-up ends for a run that has taken `step` of them."""
        warmup = self.warmup_steps
        ends = f"; warm-up ends after step {warmup}" if step < warmup else ""
        return f"{self.steps} steps in all{ends}"


def learning_rate(step: int, peak: float, schedule: ScheduleSettings) -> float:
    """Rate of the update after `step` earlier ones; reaches `peak` when warm-up ends."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(schedule.steps - warmup, 1), 1.0)
    if schedule.decay == "constant":
        return peak
    left = 1 - done if schedule.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * left)
