"""A decoder layer over a cache: its weights fused once, its keys and values kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nuwa.generation.row_linear import RowLinear
from megatron_nuwa.models.attention import Attention
from megatron_nuwa.models.layers import DecoderLayer
from megatron_nuwa.ops.decode import CellAttention, KeyValueCache, Place


class CachedLayer:
    """All that one layer remembers, and its step over the next cells."""

    def __init__(
        self,
        layer: DecoderLayer,
        encoded: Sequence[Tensor],
        own: CellAttention,
        across: CellAttention,
        slots: int,
        head_dim: int,
    ) -> None:
        """`encoded` is the encoder's output, (context cells, width) a row of the batch."""
        self._layer = layer
        back, cross = layer.self_attention, layer.cross_attention
        heads = back.heads
        past = KeyValueCache.empty(encoded[0], len(encoded), slots, heads, head_dim)
        context = _context_cache(cross, encoded, head_dim)
        self._back = self._across = self._both = None
        if layer.cross_norm is None:
            self._both = _Looking(
                [back.query, cross.query, back.key, back.value],
                [back.output, cross.output],
                [(own, past), (across, context)],
                past,
                heads,
                head_dim,
            )
        else:
            self._back = _Looking(
                [back.query, back.key, back.value],
                [back.output],
                [(own, past)],
                past,
                heads,
                head_dim,
            )
            self._across = _Looking(
                [cross.query], [cross.output], [(across, context)], None, heads, head_dim
            )
        feed_forward = layer.feed_forward
        self._expand = RowLinear(feed_forward.expand.weight, feed_forward.expand.bias, gelu=True)
        self._contract = RowLinear(feed_forward.contract.weight, feed_forward.contract.bias)

    def step(self, x: Tensor, count: int, place: Place) -> Tensor:
        """(padded rows, width) → the same; the first `count` rows are (batch · steps) vectors."""

        def look_back(h: Tensor) -> Tensor:
            assert self._back is not None
            return self._back(h, count, place)

        def look_across(h: Tensor) -> Tensor:
            assert self._across is not None
            return self._across(h, count, place)

        def look_both(h: Tensor) -> Tensor:
            assert self._both is not None
            return self._both(h, count, place)

        return self._layer.combine(x, look_back, look_across, look_both, self._feed_forward)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self._contract(self._expand(x))


def parts_of(layer: DecoderLayer) -> tuple[tuple[int, int], tuple[int, int]]:
    """(parts, part) of the queries of self- and of cross-attention; see `CellAttention`."""
    return ((4, 0), (4, 1)) if layer.cross_norm is None else ((3, 0), (1, 0))


class _Looking:
    """One attention, or two whose results are added, between two matrix products."""

    def __init__(
        self,
        inputs: Sequence[nn.Linear],
        outputs: Sequence[nn.Linear],
        attentions: Sequence[tuple[CellAttention, KeyValueCache]],
        past: KeyValueCache | None,
        heads: int,
        head_dim: int,
    ) -> None:
        """`inputs` begin with a query for each of `attentions`; `past` takes the last two."""
        self._attentions, self._past = attentions, past
        self._parts, self._heads, self._head_dim = len(inputs), heads, head_dim
        self._inward = RowLinear(*_stacked(inputs, heads, head_dim))
        self._outward = RowLinear(*_side_by_side(outputs, heads, head_dim))

    def __call__(self, h: Tensor, count: int, place: Place) -> Tensor:
        parts, heads, size = self._parts, self._heads, self._head_dim
        projected = self._inward(h)
        mixed = torch.zeros_like(projected)
        batch = self._attentions[0][1].keys.shape[0]
        shape = (batch, count // batch * parts, heads, size)
        query, out = (t[:count].view(shape) for t in (projected, mixed))
        if self._past is not None:
            new = query.view(batch, -1, parts, heads, size)[:, :, -2:]
            self._past.write(new.permute(2, 0, 1, 3, 4), place)
        for attention, cache in self._attentions:
            attention.attend(query, cache, place, out)
        return self._outward(mixed[:, : len(self._attentions) * heads * size].contiguous())


def _stacked(layers: Sequence[nn.Linear], heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of all layers at once; heads are padded with zeros to `head_dim`."""
    weights, biases = [], []
    for layer in layers:
        weight = layer.weight.unflatten(0, (heads, -1))
        missing = head_dim - weight.shape[1]
        weights.append(F.pad(weight, (0, 0, 0, missing)).flatten(0, 1))
        biases.append(F.pad(layer.bias.unflatten(0, (heads, -1)), (0, missing)).flatten())
    return torch.cat(weights), torch.cat(biases)


def _side_by_side(layers: Sequence[nn.Linear], heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that adds up what the layers make of their own inputs."""
    weights = []
    for layer in layers:
        weight = layer.weight.unflatten(1, (heads, -1))
        weights.append(F.pad(weight, (0, head_dim - weight.shape[2])).flatten(1))
    biases: list[Tensor] = [layer.bias for layer in layers]
    return torch.cat(weights, 1), torch.stack(biases).sum(0)


def _context_cache(attention: Attention, encoded: Sequence[Tensor], head_dim: int) -> KeyValueCache:
    """Keys and values of the encoder's output; equal rows of the batch are computed once."""
    made: dict[int, Tensor] = {}
    for row in encoded:
        if id(row) not in made:
            both = [
                attention.split_heads(projection(row))
                for projection in (attention.key, attention.value)
            ]
            missing = head_dim - both[0].shape[-1]
            made[id(row)] = F.pad(torch.stack(both), (0, missing))
    return KeyValueCache(torch.stack([made[id(row)] for row in encoded], 1))
