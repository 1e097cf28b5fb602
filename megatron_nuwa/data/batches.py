"""Token batches of the pretraining tasks, read from corpora in the sampling order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.sampling import Pick, SamplingOrder, rank_slice
from megatron_nuwa.data.text import NO_CAPTION, TEXT_TOKENS, TextTokenizer, text_mask
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context

TaskName = Literal["t2i", "v2v", "t2v"]
TEXT_GRID = Grid(1, 1, TEXT_TOKENS)


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of one task.

    `text` int64 (batch, 77) is what the encoder reads; `target` int64 (batch, grid cells) is what
    the decoder learns to write.
    """

    task: TaskName
    text: Tensor
    target: Tensor
    grid: Grid

    def context(self) -> Context:
        """The encoder's input, its padding masked."""
        mask = torch.from_numpy(text_mask(self.text.cpu().numpy())).to(self.text.device)
        return Context("text", self.text, TEXT_GRID, mask)

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""
        return TokenBatch(self.task, self.text.to(device), self.target.to(device), self.grid)


class TaskBatches:
    """All batches of one task.

    Text-to-image and text-to-video read one of the item's captions, replaced by the constant text
    "None" with probability `caption_dropout` (which is what classifier-free guidance needs);
    video prediction always reads "None".
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
    ) -> None:
        self.task = task
        self.grid = corpora[0].grid
        self.order = SamplingOrder(seed, task, [len(corpus) for corpus in corpora], batch_size)
        self._corpora = corpora
        self._no_caption = tokenizer.encode(NO_CAPTION)
        self._caption_dropout = 1.0 if task == "v2v" else caption_dropout

    def micro_batch(
        self, step: int, rank: int, ranks: int, part: int = 0, parts: int = 1
    ) -> TokenBatch:
        """A rank's share of the step's global batch, or one of `parts` equal parts of it."""
        picks = rank_slice(self.order.batch(step), rank, ranks)
        return self.assemble(rank_slice(picks, part, parts))

    def assemble(self, picks: Sequence[Pick]) -> TokenBatch:
        """Read the picked items."""
        text = np.stack([self._text(pick) for pick in picks]).astype(np.int64)
        target = np.stack([self._corpora[p.corpus].visual(p.item) for p in picks]).astype(np.int64)
        return TokenBatch(self.task, torch.from_numpy(text), torch.from_numpy(target), self.grid)

    def _text(self, pick: Pick) -> np.ndarray:
        if pick.dropout_draw < self._caption_dropout:
            return self._no_caption
        captions = self._corpora[pick.corpus].texts(pick.item)
        return captions[int(pick.caption_draw * len(captions))]
