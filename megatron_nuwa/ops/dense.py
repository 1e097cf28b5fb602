"""Nearby attention by masking a dense score matrix: the form that is easy to believe.

Memory grows with tokens × context tokens, so it is for small grids and for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nuwa.ops.tables import Geometry, dense_mask


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (batch, tokens, heads, size) and log-sum-exp of the scores (batch, heads, tokens)."""
    scores = _scores(query, key, mask, geometry, scale)
    log_sum = torch.logsumexp(scores, dim=-1)
    # A row without keys: exp(-inf - inf) makes every probability 0, and so the output.
    log_sum = log_sum.masked_fill(torch.isneginf(log_sum), torch.inf)
    probabilities = torch.exp(scores - log_sum.unsqueeze(-1))
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, value), log_sum


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    scores = _scores(query, key, mask, geometry, scale)
    probabilities = torch.exp(scores - log_sum.unsqueeze(-1))
    grad_value = torch.einsum("bhnm,bnhd->bmhd", probabilities, grad)
    grad_probabilities = torch.einsum("bnhd,bmhd->bhnm", grad, value)
    row_product = (grad * output).sum(-1).transpose(1, 2).unsqueeze(-1)
    grad_scores = probabilities * (grad_probabilities - row_product) * scale
    grad_query = torch.einsum("bhnm,bmhd->bnhd", grad_scores, key)
    grad_key = torch.einsum("bhnm,bnhd->bmhd", grad_scores, query)
    return grad_query, grad_key, grad_value


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, geometry: Geometry, scale: float
) -> Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    scores = scores.masked_fill(~dense_mask(geometry, query.device), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return scores
