"""Reads what the stages of a demo left behind: figures, logs, failures, samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.demo.stages import BEFORE_PAGE
from launch.workflow.display import duration
from launch.workflow.results import Goal, read_json, stage_records
from megatron_nuwa.errors import UserError

PSNR_GOAL_DB = 20.0
CODES_GOAL = 0.5
BELOW_UNIGRAM_GOAL = 0.15
MINUTES_GOAL = 12
MEMORY_GOAL_GIB = 8


@dataclass(frozen=True)
class Skipped:
    """An item that could not be read, and why."""

    corpus: str
    id: str
    reason: str


def read_goals(output: Path) -> list[Goal]:
    """The figures that the demo promises, from the run's own files."""
    vqgan = _figures(output / "vqgan" / "evaluation.json", "psnr_db", "used_fraction", "frames")
    path = output / "pretrain" / "evaluation.json"
    heldout = _figures(path, "heldout")["heldout"]
    try:
        below = float(heldout["below_unigram"])
        loss, entropy = float(heldout["loss_nats"]), float(heldout["unigram_entropy_nats"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} lacks the figures of held-out items under 'heldout'") from error
    records = stage_records(output, BEFORE_PAGE)
    seconds = sum(record.seconds for record in records)
    memory = max((record.peak_memory_bytes for record in records), default=0) / 2**30
    psnr, used = float(vqgan["psnr_db"]), float(vqgan["used_fraction"])
    return [
        Goal(
            "Reconstruction",
            f"{psnr:.1f} dB",
            f"at least {PSNR_GOAL_DB:.0f} dB",
            psnr >= PSNR_GOAL_DB,
            f"mean PSNR of {int(vqgan['frames'])} held-out frames",
        ),
        Goal(
            "Codes in use",
            f"{used:.0%}",
            f"at least {CODES_GOAL:.0%}",
            used >= CODES_GOAL,
            "share of the VQ-GAN's codebook that held-out frames need",
        ),
        Goal(
            "Below unigram entropy",
            f"{below:.0%}",
            f"at least {BELOW_UNIGRAM_GOAL:.0%}",
            below >= BELOW_UNIGRAM_GOAL,
            f"held out: {loss:.2f} nats a token against {entropy:.2f} of token frequencies alone",
        ),
        Goal(
            "Time",
            duration(seconds),
            f"at most {MINUTES_GOAL} min",
            0 < seconds <= MINUTES_GOAL * 60,
            "all stages up to this page, without installing",
        ),
        Goal(
            "Memory",
            f"{memory:.1f} GiB",
            f"at most {MEMORY_GOAL_GIB} GiB",
            0 < memory <= MEMORY_GOAL_GIB,
            "most that all processes of a stage held at once",
        ),
    ]


def corpus_counts(output: Path) -> dict[str, dict[str, int]]:
    """Counts of items, captions and failures of every corpus of the demo."""
    folders = sorted((output / "corpus").glob("*/corpus.json"))
    if not folders:
        raise UserError(f"{output / 'corpus'} holds no corpus; run the demo's stages first")
    return {path.parent.name: read_json(path)["counts"] for path in folders}


def skipped_items(output: Path) -> list[Skipped]:
    """Every item that the preprocessing farm skipped, from the shards' sidecars."""
    return [
        Skipped(sidecar.parent.name, str(failure["id"]), str(failure["reason"]))
        for sidecar in sorted((output / "corpus").glob("*/shard-*.json"))
        for failure in read_json(sidecar).get("failures", [])
    ]


def _figures(path: Path, *names: str) -> dict[str, Any]:
    figures = read_json(path)
    for name in names:
        if not isinstance(figures, dict) or name not in figures:
            raise UserError(f"{path} lacks the figure '{name}'")
    return figures
