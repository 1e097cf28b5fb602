"""What a run does about a batch whose loss jumps or is no number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_nuwa.config import Settings
from megatron_nuwa.data.batches import TaskName
from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.files import try_to_write
from megatron_nuwa.training.levels import Levels

BAD_BATCHES_FILE = "bad_batches.jsonl"
# Nats a token; jumps between losses far below it are of no harm.
_SMALL_LOSS = 0.1


class GuardSettings(Settings):
    """When the optimizer step of a batch is skipped, and when the run is stopped."""

    enabled: bool = True
    # A loss is a spike above this multiple of the median of its task's last `window` losses (of a
    # sketch task: of those with or without sketches, as it is) …
    spike_factor: float = Field(2.0, gt=1)
    window: int = Field(128, ge=8)
    # … once this many steps were taken; a loss that is no number is always skipped.
    warm_steps: int = Field(64, ge=1)
    # Skipped steps in a row that stop the run.
    patience: int = Field(3, ge=1)


@dataclass(frozen=True)
class Verdict:
    """Whether to skip a step, and why."""

    skip: bool
    reason: str = ""


class Guard:
    """Judges the losses of every step and keeps account of the skipped ones.

    Every process has one and must give it the same losses, the means over all processes, under
    names of what is comparable: a task, or the part of its steps that is of one kind. `path` is the
    run's list of bad batches on the process that writes it, None on all others.
    """

    def __init__(self, settings: GuardSettings, path: Path | None) -> None:
        self._settings, self._path = settings, path
        self._levels: dict[str, Levels] = {}
        self._taken = 0
        self._in_a_row = 0

    def verdict(self, losses: Mapping[str, float], grad_norm: float | None = None) -> Verdict:
        """Judge a step by its mean losses in nats a token; changes nothing."""
        if not self._settings.enabled:
            return Verdict(False)
        for name, loss in losses.items():
            if not math.isfinite(loss):
                return Verdict(True, f"the loss of {name} is {loss}")
        if grad_norm is not None and not math.isfinite(grad_norm):
            return Verdict(True, f"the gradient norm is {grad_norm}")
        if self._taken < self._settings.warm_steps:
            return Verdict(False)
        for name, loss in losses.items():
            levels = self._levels.get(name)
            usual = levels and levels.exceeded_by(loss, self._settings.spike_factor)
            if usual is not None:
                reason = f"the loss of {name} jumped to {loss:.3f} from about {usual:.3f}"
                return Verdict(True, reason)
        return Verdict(False)

    def accepted(self, losses: Mapping[str, float]) -> None:
        """Note the losses of a step that was taken."""
        for name, loss in losses.items():
            self._levels.setdefault(name, self._new_levels()).add(loss)
        self._taken += 1
        self._in_a_row = 0

    def skipped(
        self,
        step: int,
        reason: str,
        losses: Mapping[str, float],
        items: Mapping[TaskName, Sequence[Sequence[str]]],
    ) -> None:
        """Write a skipped step down: `items` names each task's items, replica by replica.

        `step` is counted from 1, as in the log. Raises `UserError` after `patience` such steps
        without a taken one between them, unless the guard is off.
        """
        if self._path is not None:
            numbers = {n: v if math.isfinite(v) else str(v) for n, v in losses.items()}
            entry = {"step": step, "reason": reason, "losses": numbers, "items": dict(items)}
            line = json.dumps(entry, ensure_ascii=False) + "\n"
            try_to_write(lambda: self._append(line))
        if not self._settings.enabled:
            return
        self._in_a_row += 1
        if self._in_a_row >= self._settings.patience:
            kind = ReportedElsewhereError if self._path is None else UserError
            raise kind(self._ending(step, reason, list(losses)))

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as plain JSON values."""
        levels = {name: values.state() for name, values in self._levels.items()}
        return {"levels": levels, "taken": self._taken, "in_a_row": self._in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._levels = {name: self._new_levels(v) for name, v in state["levels"].items()}
        self._taken, self._in_a_row = int(state["taken"]), int(state["in_a_row"])

    def _new_levels(self, logarithms: Sequence[float] = ()) -> Levels:
        return Levels(self._settings.window, _SMALL_LOSS, logarithms)

    def _append(self, line: str) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line)

    def _ending(self, step: int, reason: str, names: Sequence[str]) -> str:
        count = self._in_a_row
        steps = f"{count} steps in a row were" if count > 1 else "the step was"
        where = "" if self._path is None else f"; their items are listed in {self._path}"
        return (
            f"training of {', '.join(names)} stopped at step {step}, because {steps} skipped and "
            f"in the last one {reason}{where}, and the run continues from its newest checkpoint "
            "when it is started again with the cause removed or training.guard changed"
        )
