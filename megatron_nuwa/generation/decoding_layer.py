"""A decoder layer over a cache: its weights fused once, its keys and values kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nuwa.generation.row_linear import RowLinear
from megatron_nuwa.models.attention import Attention
from megatron_nuwa.models.layers import DecoderLayer
from megatron_nuwa.ops.decode import CellAttention, KeyValueCache, Place


class EncodedContext(NamedTuple):
    """The encoder's output for some rows of the batch, and who looks where in it.

    `rows`: (context cells, width) each.
    """

    rows: Sequence[Tensor]
    attention: CellAttention


class _Look(NamedTuple):
    """An attention to a cache, of all rows of the batch or of some."""

    attention: CellAttention
    cache: KeyValueCache
    rows: slice | None


class CachedLayer:
    """All that one layer remembers, and its step over the next cells."""

    def __init__(
        self,
        layer: DecoderLayer,
        contexts: Sequence[EncodedContext],
        own: CellAttention,
        slots: int,
        head_dim: int,
    ) -> None:
        self._layer = layer
        back, cross = layer.self_attention, layer.cross_attention
        heads, like = back.heads, contexts[0].rows[0]
        batch = sum(len(context.rows) for context in contexts)
        past = KeyValueCache.empty(like, batch, slots, heads, head_dim)
        looks_back = _Look(own, past, None)
        looks_across = []
        first = 0
        for context in contexts:
            rows = slice(first, first + len(context.rows)) if len(contexts) > 1 else None
            cache = _context_cache(cross, context.rows, head_dim)
            looks_across.append(_Look(context.attention, cache, rows))
            first += len(context.rows)
        self._back = self._across = self._both = None
        if layer.cross_norm is None:
            self._both = _Looking(
                [back.query, cross.query, back.key, back.value],
                [back.output, cross.output],
                [looks_back, *looks_across],
                past,
                batch,
                heads,
                head_dim,
            )
        else:
            self._back = _Looking(
                [back.query, back.key, back.value],
                [back.output],
                [looks_back],
                past,
                batch,
                heads,
                head_dim,
            )
            self._across = _Looking(
                [cross.query], [cross.output], looks_across, None, batch, heads, head_dim
            )
        feed_forward = layer.feed_forward
        self._expand = RowLinear(feed_forward.expand.weight, feed_forward.expand.bias, gelu=True)
        self._contract = RowLinear(feed_forward.contract.weight, feed_forward.contract.bias)

    def step(self, x: Tensor, count: int, slots: Place) -> Tensor:
        """(padded rows, width) → the same; the first `count` rows are (batch · steps) vectors.

        `slots` is where the cells' keys and values go; the attentions know the cells already.
        """

        def look_back(h: Tensor) -> Tensor:
            assert self._back is not None
            return self._back(h, count, slots)

        def look_across(h: Tensor) -> Tensor:
            assert self._across is not None
            return self._across(h, count, slots)

        def look_both(h: Tensor) -> Tensor:
            assert self._both is not None
            return self._both(h, count, slots)

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
        looks: Sequence[_Look],
        past: KeyValueCache | None,
        batch: int,
        heads: int,
        head_dim: int,
    ) -> None:
        """`inputs` begin with the queries of `outputs`; `past` takes the last two of them."""
        self._looks, self._past, self._batch = looks, past, batch
        self._mixed = len(outputs) * heads * head_dim
        self._parts, self._heads, self._head_dim = len(inputs), heads, head_dim
        self._inward = RowLinear(*_stacked(inputs, heads, head_dim))
        self._outward = RowLinear(*_side_by_side(outputs, heads, head_dim))

    def __call__(self, h: Tensor, count: int, slots: Place) -> Tensor:
        parts, heads, size = self._parts, self._heads, self._head_dim
        projected = self._inward(h)
        mixed = torch.empty_like(projected)
        mixed[count:].zero_()
        batch = self._batch
        shape = (batch, count // batch * parts, heads, size)
        query, out = (t[:count].view(shape) for t in (projected, mixed))
        if self._past is not None:
            new = query.view(batch, -1, parts, heads, size)[:, :, -2:]
            self._past.write(new.permute(2, 0, 1, 3, 4), slots)
        for attention, cache, rows in self._looks:
            if rows is None:
                attention.attend(query, cache, out)
            else:
                attention.attend(query[rows], cache, out[rows])
        return self._outward(mixed[:, : self._mixed])


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
