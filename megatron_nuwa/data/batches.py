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
from megatron_nuwa.models.nuwa import Context, ContextKind

TaskName = Literal["t2i", "v2v", "t2v", "s2i", "s2v"]
# Tasks whose targets are images, and those whose encoder reads the item's sketch.
IMAGE_TASKS: frozenset[TaskName] = frozenset(("t2i", "s2i"))
SKETCH_TASKS: frozenset[TaskName] = frozenset(("s2i", "s2v"))
TEXT_GRID = Grid(1, 1, TEXT_TOKENS)


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of one task.

    `context` is what the encoder reads, texts with their padding masked or sketches; `target` int64
    (batch, grid cells) is what the decoder learns to write. `share` is the part of the replica's
    samples of this task and step that lies in this micro-batch: the sum of share × mean loss is the
    task's mean loss, however the samples are cut.
    """

    task: TaskName
    context: Context
    target: Tensor
    grid: Grid
    share: float = 1.0

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""
        return replace(self, context=self.context.to(device), target=self.target.to(device))


def context_of(task: TaskName, grid: Grid) -> tuple[ContextKind, Grid]:
    """Kind and grid of what the encoder reads in a task whose targets have `grid`."""
    return ("sketch", grid) if task in SKETCH_TASKS else ("text", TEXT_GRID)


class TaskBatches:
    """All batches of one task.

    Text-to-image and text-to-video read one of the item's captions, replaced by the constant text
    "None" with probability `caption_dropout` (which is what classifier-free guidance needs);
    video prediction always reads "None". Sketch-to-image and sketch-to-video read the item's
    sketch. A micro-batch has one kind of context, and all processes must run the same kind at once,
    so there the draw is the step's: with that probability all its samples read "None".

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
        self._caption_dropout = caption_dropout

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
        reads_sketches = self.reads_sketches(step)
        return [
            replace(
                self.assemble(picks.part(end - size, end), reads_sketches), share=size / len(picks)
            )
            for size, end in zip(sizes, accumulate(sizes), strict=True)
        ]

    def reads_sketches(self, step: int) -> bool:
        """Whether the encoder reads sketches in a step, and texts if not."""
        is_dropped = self.order.step_draw(step) < self._caption_dropout
        return self.task in SKETCH_TASKS and not is_dropped

    def item_names(self, step: int, rank: int, ranks: int) -> list[str]:
        """`CORPUS:ID` of the samples that a data-parallel replica reads in a step."""
        picks = list(self.order.rank_picks(step, rank, ranks))
        corpora = [self._corpora[pick.corpus] for pick in picks]
        return [
            f"{corpus.address}:{corpus.item(pick.item)['id']}"
            for corpus, pick in zip(corpora, picks, strict=True)
        ]

    def assemble(
        self, picks: Picks | Sequence[Pick], reads_sketches: bool | None = None
    ) -> TokenBatch:
        """Read the picked items; None has a task that is for sketches read them."""
        if not isinstance(picks, Picks):
            picks = Picks.of(picks)
        if reads_sketches is None:
            reads_sketches = self.task in SKETCH_TASKS
        target = np.empty((len(picks), self.grid.cells), np.int64)
        for number, corpus in enumerate(self._corpora):
            mine = np.flatnonzero(picks.corpus == number)
            corpus.read_visual(picks.item[mine], target, mine)
        context = self._sketches(picks) if reads_sketches else self._texts(picks)
        return TokenBatch(self.task, context, torch.from_numpy(target), self.grid)

    def _texts(self, picks: Picks) -> Context:
        text = np.empty((len(picks), TEXT_TOKENS), np.int64)
        is_dropped = picks.dropout_draw < self._caption_dropout
        if self.task == "v2v" or self.task in SKETCH_TASKS:
            is_dropped[:] = True
        text[is_dropped] = self._no_caption
        for number, corpus in enumerate(self._corpora):
            read = np.flatnonzero((picks.corpus == number) & ~is_dropped)
            corpus.read_captions(picks.item[read], picks.caption_draw[read], text, read)
        tokens, mask = torch.from_numpy(text), torch.from_numpy(text_mask(text))
        return Context("text", tokens, TEXT_GRID, mask)

    def _sketches(self, picks: Picks) -> Context:
        sketches = np.empty((len(picks), self.grid.cells), np.int64)
        for number, corpus in enumerate(self._corpora):
            mine = np.flatnonzero(picks.corpus == number)
            corpus.read_sketches(picks.item[mine], sketches, mine)
        return Context("sketch", torch.from_numpy(sketches), self.grid)

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
