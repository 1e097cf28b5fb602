"""Reads what the stages of moving digits left behind: scores, goals, times."""

from __future__ import annotations

from pathlib import Path

from launch.moving_digits.scorer import Score, Scores, Share, share_text
from launch.moving_digits.sizes import Size
from launch.moving_digits.stages import BEFORE_PAGE, SAMPLES
from launch.workflow.display import duration
from launch.workflow.results import Goal, read_json, stage_records
from megatron_nuwa.config import parse_settings
from megatron_nuwa.errors import UserError

SCORER_GOAL = 0.97
_HELD_OUT = next(iter(SAMPLES))
_OF_REAL = "of real held-out clips as the VQ-GAN reconstructs them"


def read_scores(output: Path) -> Scores:
    """The scores of a run; `UserError` where there are none."""
    path = output / "scores.json"
    return parse_settings(Scores, read_json(path), str(path))


def held_out_score(scores: Scores) -> Score:
    """The score of the captions that were held out from training."""
    for score in scores.samples:
        if score.name == _HELD_OUT:
            return score
    raise UserError(f"the scores lack the samples of {_HELD_OUT}")


def read_goals(size: Size, output: Path) -> list[Goal]:
    """What the proof promises, and what was reached."""
    scores = read_scores(output)
    asked, reconstructed = held_out_score(scores), scores.reconstructed
    goals = [
        _goal(
            "Right digit", asked.digit, size.goal, "of clips from captions held out; chance 10 %"
        ),
        _goal("Right motion", asked.motion, size.goal, "of the same clips; chance 6 %"),
        _goal("The scorer reads digits", reconstructed.digit, SCORER_GOAL, _OF_REAL),
        _goal("The scorer reads motions", reconstructed.motion, SCORER_GOAL, _OF_REAL),
    ]
    if size.minutes is not None:
        seconds = sum(record.seconds for record in stage_records(output, BEFORE_PAGE))
        goals.append(
            Goal(
                "Time",
                duration(seconds),
                f"at most {size.minutes} min",
                0 < seconds <= size.minutes * 60,
                "all stages up to this page, without installing",
            )
        )
    return goals


def _goal(name: str, share: Share, goal: float, detail: str) -> Goal:
    value = share_text(share)
    return Goal(name, value, f"at least {goal:.0%}", share.value >= goal, detail)
