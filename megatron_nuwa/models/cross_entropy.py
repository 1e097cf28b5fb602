"""Cross-entropy of logits over the whole codebook, and how little of it has to be in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tokens whose logits are fp32 at once: 48 MiB of the paper's codebook.
_CHUNK = 1024


class CrossEntropy(nn.Module):
    """Mean cross-entropy of tokens, in nats a token, fp32 (paper Eq. 12).

    fp32 copies of the logits, which are the largest tensors of a step, exist of a few tokens at a
    time only.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (batch, cells, codes) and int64 (batch, cells) → a scalar."""
        logits, target = logits.flatten(0, 1), target.flatten()
        if torch.compiler.is_compiling():
            # The compiler computes the fp32 values where it needs them and keeps none.
            return F.cross_entropy(logits.float(), target)
        mean: Tensor = _ChunkedCrossEntropy.apply(logits, target)
        return mean


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_totals, losses = [], []
        for part, wanted in zip(logits.split(_CHUNK), target.split(_CHUNK), strict=True):
            wide = part.float()
            log_total = wide.logsumexp(-1)
            log_totals.append(log_total)
            losses.append(log_total - wide.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
        ctx.save_for_backward(logits, target, torch.cat(log_totals))
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, target, log_total = ctx.saved_tensors
        slope = torch.empty_like(logits)
        scale = gradient / len(target)
        tensors = (slope, logits, target, log_total)
        for mine, part, wanted, total in zip(*(t.split(_CHUNK) for t in tensors), strict=True):
            wide = (part.float() - total.unsqueeze(-1)).exp_()
            wide.scatter_add_(-1, wanted.unsqueeze(-1), wide.new_full((len(wanted), 1), -1))
            mine.copy_(wide.mul_(scale))
        return slope, None
