"""Held-out cross-entropy, beside what a model that only knew each token's frequency would score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_nuwa.data.batches import IMAGE_TASKS, TaskBatches, TaskName, TokenBatch
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.sampling import Pick
from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.files import try_to_write, write_text_atomically
from megatron_nuwa.training.engine import Engine, Loss
from megatron_nuwa.training.inputs import Inputs
from megatron_nuwa.training.recipe import Recipe

EVALUATION_FILE = "evaluation.json"
_MADE_UP_FILE = ".evaluation_made_up"


class HeldOut:
    """The held-out items of one task: every item once, nothing dropped, captions the first."""

    def __init__(
        self,
        task: TaskName,
        corpora: Sequence[Corpus],
        tokenizer: TextTokenizer,
        *,
        batch_size: int,
        items: int | None,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        reader = TaskBatches(task, corpora, tokenizer, seed=0, batch_size=batch_size)
        every = [
            # A draw of 1 lies above every dropout probability.
            Pick(number, item, 0.0, 1.0)
            for number, corpus in enumerate(corpora)
            for item in range(len(corpus))
        ]
        picks = every[:items]
        tokens = np.concatenate([corpora[p.corpus].visual(p.item) for p in picks])
        self.unigram_entropy = unigram_entropy(np.bincount(tokens))
        self._reader, self._picks, self._batch_size = reader, picks, batch_size
        self._replica, self._replicas = replica, replicas

    def batches(self) -> list[TokenBatch]:
        """This replica's part of the items, each batch with its number of items as its share.

        Every replica has as many: one with fewer items repeats one, with a share of 0.
        """
        longest = self._picks[:: self._replicas]
        own = self._picks[self._replica :: self._replicas]
        batches = []
        for start in range(0, len(longest), self._batch_size):
            part = own[start : start + self._batch_size]
            batch = self._reader.assemble(part or self._picks[:1])
            batches.append(replace(batch, share=float(len(part))))
        return batches


def held_out_items(
    recipe: Recipe, inputs: Inputs, replica: int, replicas: int
) -> dict[TaskName, HeldOut]:
    """The held-out items of all tasks that the recipe evaluates."""
    settings = recipe.evaluation
    if settings is None:
        return {}
    return {
        task: HeldOut(
            task,
            corpora,
            inputs.bpe,
            batch_size=settings.batch_size,
            items=settings.items,
            replica=replica,
            replicas=replicas,
        )
        for task, corpora in inputs.held_out.items()
    }


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that a histogram of tokens describes."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def evaluate(
    engine: Engine, held_out: Mapping[TaskName, HeldOut]
) -> dict[TaskName, dict[str, float]]:
    """For each task: `loss_nats`, `unigram_entropy_nats`, and the share that lies between.

    Every process must call it and gets the same numbers.
    """
    result: dict[TaskName, dict[str, float]] = {}
    for task, items in held_out.items():
        batches = items.batches() if engine.place.reads_data else []
        loss, entropy = _mean(engine.evaluate(batches), engine.device), items.unigram_entropy
        result[task] = {
            "loss_nats": loss,
            "unigram_entropy_nats": entropy,
            "below_unigram": 1 - loss / entropy,
        }
    return result


def summary(result: Mapping[TaskName, Mapping[str, float]]) -> dict[str, object]:
    """The tasks' figures, and beside them those of the clip task that gains least on the unigrams.

    Without tasks of clips it is any task that gains least.
    """
    clips = [figures for task, figures in result.items() if task not in IMAGE_TASKS]
    worst = min(clips or result.values(), key=lambda figures: figures["below_unigram"])
    return {**worst, "tasks": result}


def as_tags(result: Mapping[TaskName, Mapping[str, float]]) -> dict[str, float]:
    """The tasks' figures under the tags of the run's figures."""
    return {
        f"eval/{figure}/{task}": value
        for task, figures in result.items()
        for figure, value in figures.items()
    }


def write_evaluation(run: Path, step: int, result: Mapping[TaskName, Mapping[str, float]]) -> None:
    """Leave the figures of an evaluation after `step` steps in the run's folder."""
    text = json.dumps({"step": step, "heldout": summary(result)}, indent=2)
    try_to_write(lambda: write_text_atomically(run / EVALUATION_FILE, text))


def must_be_made_up(run: Path, step: int) -> bool:
    """Whether the evaluation after a run's last step was cut short; said once a step.

    Whatever ends the run in there, a kernel's crash too, might do so at every start.
    """
    if step in (_step_of(run / EVALUATION_FILE), _step_of(run / _MADE_UP_FILE)):
        return False
    try_to_write(lambda: write_text_atomically(run / _MADE_UP_FILE, json.dumps({"step": step})))
    return True


def _step_of(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def in_words(result: Mapping[TaskName, Mapping[str, float]]) -> str:
    """The tasks' figures for the console."""
    return ", ".join(
        f"{task} {figures['loss_nats']:.3f} nats a token "
        f"({figures['below_unigram']:.1%} below unigram)"
        for task, figures in result.items()
    )


def _mean(losses: Sequence[Loss], device: torch.device) -> float:
    """Mean over all items of all replicas, in nats a token."""
    totals = torch.zeros(2, dtype=torch.float64)
    for loss in losses:
        totals += torch.tensor([float(loss.mean) * loss.share, loss.share], dtype=torch.float64)
    totals = totals.to(device)
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])
