"""Reads what stages left behind: figures, logs, records, and goals beside what was reached."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.workflow.runner import StageRecord, read_record
from megatron_nuwa.errors import UserError


@dataclass(frozen=True)
class Goal:
    """One figure of the run beside what it was to reach."""

    name: str
    value: str
    goal: str
    met: bool
    detail: str


def read_json(path: Path) -> Any:
    """Parse a JSON file; `UserError` names it where it is absent or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); run the stages that write it first"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Parse a JSON-lines file; `UserError` names it and the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); run the stages that write it first"
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
    return rows


def stage_records(output: Path, names: Iterable[str]) -> list[StageRecord]:
    """The records of those stages that are done, in the order of `names`."""
    found = (read_record(output, name) for name in names)
    return [record for record in found if record and record.state == "done"]


def read_log(run: Path) -> dict[int, dict[str, float]]:
    """A run's log as step → tag → value; after a resume the later line of a step counts."""
    log: dict[int, dict[str, float]] = {}
    for row in read_json_lines(run / "log.jsonl"):
        log.setdefault(int(row["step"]), {}).update(row)
    return log


def series(log: dict[int, dict[str, float]], tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of one tag."""
    steps = [step for step in sorted(log) if tag in log[step]]
    return steps, [float(log[step][tag]) for step in steps]


def typical(log: dict[int, dict[str, float]], tag: str) -> float | None:
    """The median of a tag over a run, which start-up and saving do not move."""
    _, values = series(log, tag)
    return statistics.median(values) if values else None
