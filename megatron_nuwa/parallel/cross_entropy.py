"""Cross-entropy of logits whose vocabulary is split over a tensor-parallel group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nuwa.models.cross_entropy import CrossEntropy
from megatron_nuwa.parallel.collectives import TensorGroup, all_reduced


class VocabularyParallelCrossEntropy(CrossEntropy):
    """Mean cross-entropy of tokens, in nats a token, fp32; the same on every process."""

    def __init__(self, tensor: TensorGroup) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Own part of the logits (batch, at least cells, codes/size), int64 (batch, cells).

        Logits behind the last cell, padding of the sequence, are not looked at.
        """
        cells = target.shape[1]
        if logits.shape[1] > cells:
            logits = logits[:, :cells]
        return _CrossEntropy.apply(self.tensor, logits, target)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: TensorGroup, logits: Tensor, target: Tensor) -> Tensor:
        ctx.length = logits.shape[-1]
        local, inside = _own_place(target, tensor.rank * ctx.length, ctx.length)
        wide = logits.float()
        largest = all_reduced(wide.amax(-1), tensor, dist.ReduceOp.MAX)
        shifted = wide - largest.unsqueeze(-1)
        of_target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~inside, 0)
        # One collective for both sums.
        total, of_target = all_reduced(torch.stack([shifted.exp_().sum(-1), of_target]), tensor)
        log_total = total.log()
        # The logits in their own type are half of what their softmax would take in fp32.
        ctx.save_for_backward(logits, largest + log_total, target)
        ctx.start = tensor.rank * ctx.length
        return (log_total - of_target).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_total, target = ctx.saved_tensors
        local, inside = _own_place(target, ctx.start, ctx.length)
        slope = (logits.float() - log_total.unsqueeze(-1)).exp_()
        slope.scatter_add_(-1, local.unsqueeze(-1), -inside.to(slope.dtype).unsqueeze(-1))
        return None, slope.mul_(gradient / target.numel()).to(logits.dtype), None


def _own_place(target: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Where a token lies in the own part of the vocabulary (0 if it does not), and whether."""
    local = target - start
    inside = (local >= 0) & (local < length)
    return local.masked_fill(~inside, 0), inside
