"""Token batches of the pretraining tasks, read from corpora in the sampling order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.sampling import Pick, Picks, SamplingOrder, even_sizes
from megatron_nuwa.data.text import NO_CAPTION, TEXT_TOKENS, TextTokenizer, text_mask
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context

TaskName = Literal["t2i", "v2v", "t2v"]
TEXT_GRID = Grid(1, 1, TEXT_TOKENS)


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of one task.

    `text` int64 (batch, 77) is what the encoder reads, `mask` bool of that shape is False at its
    padding; `target` int64 (batch, grid cells) is what the decoder learns to write. `share` is the
    part of the replica's samples of this task and step that lies in this micro-batch: the sum of
    share × mean loss is the task's mean loss, however the samples are cut.
    """

    task: TaskName
    text: Tensor
    target: Tensor
    grid: Grid
    mask: Tensor
    share: float = 1.0

    def context(self) -> Context:
        """The encoder's input, its padding masked."""
        return Context("text", self.text, TEXT_GRID, self.mask)

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""
        text, target, mask = (t.to(device) for t in (self.text, self.target, self.mask))
        return replace(self, text=text, target=target, mask=mask)


class TaskBatches:
    """All batches of one task.

    Text-to-image and text-to-video read one of the item's captions, replaced by the constant text
    "None" with probability `caption_dropout` (which is what classifier-free guidance needs);
    video prediction always reads "None".

    `corpus_weights` are the corpora's shares of the samples; None for shares by size. A replica
    cuts its samples of a step into micro-batches of at most `micro_batch_tokens` target tokens
    (but at least one sample), or into `accumulation` of them where that is None.

    With `shuffle_window` the items are shuffled among that many shards at a time, for corpora
    far away or on a slow disk. Of a remote corpus the shards of `read_ahead` steps from now are
    brought here meanwhile.
    """

    def __init__(
        self,
        task: TaskName,
        corpora: Sequence[Corpus],
        tokenizer: TextTokenizer,
        *,
        seed: int,
        batch_size: int,
        caption_dropout: float = 0.0,
        corpus_weights: Sequence[float] | None = None,
        micro_batch_tokens: int | None = None,
        accumulation: int = 1,
        shuffle_window: int | None = None,
        read_ahead: int = 16,
    ) -> None:
        self.task = task
        self.grid = corpora[0].grid
        sizes = [len(corpus) for corpus in corpora]
        shards = [corpus.shard_sizes for corpus in corpora]
        self.order = SamplingOrder(
            seed, task, sizes, batch_size, corpus_weights, shuffle_window, shards
        )
        self._read_ahead = read_ahead
        self._micro_batch_tokens = micro_batch_tokens
        self._accumulation = accumulation
        self._corpora = corpora
        self._no_caption = tokenizer.encode(NO_CAPTION)
        self._caption_dropout = 1.0 if task == "v2v" else caption_dropout

    def micro_batch_count(self, ranks: int) -> int:
        """Micro-batches of this task a step, the same on each of the data-parallel replicas."""
        if self._micro_batch_tokens is None:
            return self._accumulation
        samples = max(1, self._micro_batch_tokens // self.grid.cells)
        return -(-(self.order.batch_size // ranks) // samples)

    def micro_batches(self, step: int, rank: int, ranks: int) -> list[TokenBatch]:
        """The share of data-parallel replica `rank` in the step's global batch, in order.

        Raises `ValueError` where the batch does not divide by the replicas.
        """
        if self._read_ahead and any(corpus.is_remote for corpus in self._corpora):
            self._expect(self.order.rank_picks(step + self._read_ahead, rank, ranks))
        picks = self.order.rank_picks(step, rank, ranks)
        sizes = even_sizes(len(picks), self.micro_batch_count(ranks))
        return [
            replace(self.assemble(picks.part(end - size, end)), share=size / len(picks))
            for size, end in zip(sizes, accumulate(sizes), strict=True)
        ]

    def item_names(self, step: int, rank: int, ranks: int) -> list[str]:
        """`CORPUS:ID` of the samples that a data-parallel replica reads in a step."""
        picks = list(self.order.rank_picks(step, rank, ranks))
        corpora = [self._corpora[pick.corpus] for pick in picks]
        return [
            f"{corpus.address}:{corpus.item(pick.item)['id']}"
            for corpus, pick in zip(corpora, picks, strict=True)
        ]

    def assemble(self, picks: Picks | Sequence[Pick]) -> TokenBatch:
        """Read the picked items."""
        if not isinstance(picks, Picks):
            picks = Picks.of(picks)
        text = np.empty((len(picks), TEXT_TOKENS), np.int64)
        target = np.empty((len(picks), self.grid.cells), np.int64)
        is_dropped = picks.dropout_draw < self._caption_dropout
        text[is_dropped] = self._no_caption
        for number, corpus in enumerate(self._corpora):
            mine = np.flatnonzero(picks.corpus == number)
            corpus.read_visual(picks.item[mine], target, mine)
            read = mine[~is_dropped[mine]]
            corpus.read_captions(picks.item[read], picks.caption_draw[read], text, read)
        ids, cells, mask = (torch.from_numpy(array) for array in (text, target, text_mask(text)))
        return TokenBatch(self.task, ids, cells, self.grid, mask)

    def _expect(self, picks: Picks) -> None:
        for number, corpus in enumerate(self._corpora):
            corpus.expect(picks.item[picks.corpus == number])


def interleave(batches: Mapping[TaskName, Sequence[TokenBatch]]) -> list[TokenBatch]:
    """All tasks' micro-batches in one order in which every task is spread over the whole step.

    The order follows from the tasks' numbers of micro-batches alone, so that it is the same on
    every process.
    """
    placed = [
        ((2 * number + 1) / (2 * len(of_task)), batch)
        for of_task in batches.values()
        for number, batch in enumerate(of_task)
    ]
    return [batch for _, batch in sorted(placed, key=lambda entry: entry[0])]
