"""Held-out cross-entropy, beside what a model that only knew each token's frequency would score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_nuwa.data.batches import TaskBatches, TaskName
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.sampling import Pick
from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.training.processes import Processes


class HeldOut:
    """The held-out items of one task: every item once, its first caption, nothing dropped."""

    def __init__(
        self,
        task: TaskName,
        corpora: Sequence[Corpus],
        tokenizer: TextTokenizer,
        *,
        batch_size: int,
        items: int | None,
    ) -> None:
        self._batches = TaskBatches(task, corpora, tokenizer, seed=0, batch_size=batch_size)
        every = [
            # A draw of 1 lies above every dropout probability but video prediction's.
            Pick(number, item, 0.0, 0.0 if task == "v2v" else 1.0)
            for number, corpus in enumerate(corpora)
            for item in range(len(corpus))
        ]
        self._picks = every[:items]
        self._batch_size = batch_size
        tokens = np.concatenate([corpora[p.corpus].visual(p.item) for p in self._picks])
        self.unigram_entropy = unigram_entropy(np.bincount(tokens))

    @torch.no_grad()
    def loss(self, model: Nuwa, processes: Processes) -> float:
        """Nats a token over all items; every process must call it and gets the same number."""
        own = self._picks[processes.rank :: processes.world_size]
        totals = torch.zeros(2, dtype=torch.float64, device=processes.device)
        for start in range(0, len(own), self._batch_size):
            batch = self._batches.assemble(own[start : start + self._batch_size])
            batch = batch.to(processes.device)
            mean = model.loss(batch.context(), batch.target, batch.grid)
            totals += torch.tensor([float(mean) * batch.target.numel(), batch.target.numel()])
        dist.all_reduce(totals)
        return float(totals[0] / totals[1])


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that a histogram of tokens describes."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def evaluate(
    model: Nuwa, held_out: Mapping[TaskName, HeldOut], processes: Processes
) -> dict[TaskName, dict[str, float]]:
    """For each task: `loss_nats`, `unigram_entropy_nats`, and the share that lies between."""
    was_training = model.training
    model.eval()
    result: dict[TaskName, dict[str, float]] = {}
    for task, items in held_out.items():
        loss, entropy = items.loss(model, processes), items.unigram_entropy
        result[task] = {
            "loss_nats": loss,
            "unigram_entropy_nats": entropy,
            "below_unigram": 1 - loss / entropy,
        }
    model.train(was_training)
    return result
