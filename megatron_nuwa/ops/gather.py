"""Nearby attention by walking the neighbour tables one slot at a time.

Memory grows with tokens × (window + head size) and never holds a dense score matrix. Gradients of
keys and values walk the mirrored table, so that no two writers meet and the result is the same on
every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nuwa.ops.tables import Geometry, key_table, query_table


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (batch, tokens, heads, size) and log-sum-exp of the scores (batch, heads, tokens)."""
    table = key_table(geometry, query.device)
    batch, tokens, heads, _ = query.shape
    scores = query.new_empty(batch, tokens, heads, table.width)
    for slot in range(table.width):
        index = table.index[:, slot]
        product = (query * key.index_select(1, index)).sum(-1) * scale
        scores[..., slot] = product.masked_fill(
            ~_visible(table.valid[:, slot], mask, index), -torch.inf
        )
    log_sum = torch.logsumexp(scores, dim=-1)
    log_sum = log_sum.masked_fill(torch.isneginf(log_sum), torch.inf)
    probabilities = torch.exp(scores - log_sum.unsqueeze(-1))
    output = torch.zeros_like(query)
    for slot in range(table.width):
        neighbour = value.index_select(1, table.index[:, slot])
        output.addcmul_(probabilities[..., slot, None], neighbour)
    return output, log_sum.transpose(1, 2).contiguous()


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
    log_sum = log_sum.transpose(1, 2)
    row_product = (grad * output).sum(-1)
    grad_query = torch.zeros_like(query)
    keys_of = key_table(geometry, query.device)
    for slot in range(keys_of.width):
        index = keys_of.index[:, slot]
        key_here, value_here = key.index_select(1, index), value.index_select(1, index)
        visible = _visible(keys_of.valid[:, slot], mask, index)
        score = (query * key_here).sum(-1) * scale - log_sum
        probability = _probability(score, visible)
        grad_score = probability * ((grad * value_here).sum(-1) - row_product) * scale
        grad_query.addcmul_(grad_score.unsqueeze(-1), key_here)

    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    queries_of = query_table(geometry, query.device)
    for slot in range(queries_of.width):
        index = queries_of.index[:, slot]
        query_here, grad_here = query.index_select(1, index), grad.index_select(1, index)
        visible = queries_of.valid[:, slot, None]
        if mask is not None:
            visible = visible & mask.unsqueeze(-1)
        score = (query_here * key).sum(-1) * scale - log_sum.index_select(1, index)
        probability = _probability(score, visible)
        product = (grad_here * value).sum(-1) - row_product.index_select(1, index)
        grad_key.addcmul_((probability * product * scale).unsqueeze(-1), query_here)
        grad_value.addcmul_(probability.unsqueeze(-1), grad_here)
    return grad_query, grad_key, grad_value


def _probability(score: Tensor, visible: Tensor) -> Tensor:
    # Not a product with `visible`: what is not to be seen may score so high that exp is infinite.
    return torch.exp(score.masked_fill(~visible, -torch.inf))


def _visible(valid: Tensor, mask: Tensor | None, index: Tensor) -> Tensor:
    """Bool, broadcastable to (batch, tokens, heads): is the neighbour in this slot to be seen?"""
    visible = valid.unsqueeze(-1)
    return visible if mask is None else visible & mask.index_select(1, index).unsqueeze(-1)
